"""Semantic search: finds what answers a question, also where it shares no word with it.

    python examples/semantic_search.py "How do I get my money back?"

Needs a running server (`make serve`), and `pip install openai numpy`.
"""

import os
import sys

import numpy as np
from openai import OpenAI

URL = os.environ.get("EMBEDSERVE_URL", "http://127.0.0.1:8000")
MODEL = "all-MiniLM-L6-v2"

ARTICLES = [
    "Refunds are paid to the card that was charged, within five working days.",
    "To reset a forgotten password, choose 'Sign in' and then 'Send me a link'.",
    "Parcels are delivered from Monday to Saturday, between eight and eighteen o'clock.",
    "Your invoice is attached to the confirmation that we send by e-mail.",
    "An order can be cancelled free of charge until it has left our warehouse.",
    "We never sell your personal data, and delete it when you close your account.",
    "Batteries carry a guarantee of two years from the day of purchase.",
    "Our support team answers the telephone on working days until six in the evening.",
]


def embed(client: OpenAI, texts: list[str], input_type: str) -> np.ndarray:
    """Unit vectors, [texts, dimensions]. `input_type` puts the model's prompt before each, where the model has one."""
    answer = client.embeddings.create(model=MODEL, input=texts, extra_body={"input_type": input_type})
    return np.array([item.embedding for item in answer.data])


def main() -> None:
    """Print the three articles nearest to each question."""
    questions = sys.argv[1:] or ["How do I get my money back?", "I can't log in any more", "When will it arrive?"]
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("EMBEDSERVE_KEY", "none"))
    articles = embed(client, ARTICLES, "document")  # once; a real program keeps them in a vector database
    # Vectors have length 1, so the inner product is the cosine.
    scores = embed(client, questions, "query") @ articles.T
    for question, row in zip(questions, scores, strict=True):
        print(question)
        for article in row.argsort()[::-1][:3]:
            print(f"  {row[article]:.2f}  {ARTICLES[article]}")


if __name__ == "__main__":
    main()
