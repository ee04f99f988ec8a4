"""The page of `indra monitor`: a local server and what it answers. The folder web has what the browser gets."""
