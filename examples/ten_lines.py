"""Text to a trained model to written text, in ten lines: `python examples/ten_lines.py notes.txt path/to/tokenizer`."""

import sys

import indraquantum


def main(text, tokenizer, folder="ten_lines"):
    """Train on the paragraphs of a text file without a teacher; return the report and what the model writes."""
    rows = indraquantum.prepare(
        text=(text,), wikitext_samples=0, alpaca_samples=0, tokenizer=tokenizer, output=f"{folder}/rows.pkl"
    )
    report = indraquantum.train(
        data=rows.folder, no_teacher=True, output=f"{folder}/run", logs=f"{folder}/logs", epochs=3,
        d_model=32, layers=2, heads=2, mlp_width=96, batch_tokens=512,
    )  # fmt: skip
    model = indraquantum.load(report.checkpoint)
    return report, model.generate("The", max_new_tokens=20)


if __name__ == "__main__":
    trained, written = main(*sys.argv[1:])
    print(f"held-out cross-entropy {trained.held_out['all']:.2f} nats a token")
    for token in written.tokens:
        print(f"{token.text!r:12} probability {token.probability:.3f}")
