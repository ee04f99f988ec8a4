"""The page of `indra monitor`: a local server, what it answers, and the state explorer. web/ has what the browser gets."""
