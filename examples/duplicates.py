"""Duplicate detection: which tickets say the same in other words.

    python examples/duplicates.py

Uses Python's own HTTP client, and base64: a quarter of the bytes of decimal numbers. Needs a running server (`make
serve`), and `pip install numpy`.
"""

import base64
import json
import os
from urllib.request import Request, urlopen

import numpy as np

URL = os.environ.get("EMBEDSERVE_URL", "http://127.0.0.1:8000")
MODEL = "all-MiniLM-L6-v2"
# Depends on the model and on the texts: look at some pairs near it before you trust it.
SAME = 0.65

TICKETS = [
    "The app crashes when I open the camera.",
    "Please change my delivery address.",
    "Opening the camera makes the application crash.",
    "I was charged twice for one order.",
    "How can I export my data as a spreadsheet?",
    "My credit card was billed two times for the same order.",
    "The app crashes when I open the calendar.",
    "I would like to change the address my parcel goes to.",
]


def embed(texts: list[str]) -> np.ndarray:
    """Unit vectors, float32 [texts, dimensions]."""
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {os.environ.get('EMBEDSERVE_KEY', 'none')}",
    }
    body = json.dumps({"model": MODEL, "input": texts, "encoding_format": "base64"}).encode()
    with urlopen(Request(f"{URL}/v1/embeddings", body, headers)) as answer:
        items = json.load(answer)["data"]
    return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4") for item in items])


def main() -> None:
    """Print the pairs that are alike, the most alike first."""
    vectors = embed(TICKETS)
    scores = np.triu(vectors @ vectors.T, k=1)
    pairs = np.argwhere(scores > SAME)
    for one, other in sorted(pairs.tolist(), key=lambda pair: -scores[tuple(pair)]):
        print(f"{scores[one, other]:.2f}  {TICKETS[one]}\n      {TICKETS[other]}")


if __name__ == "__main__":
    main()
