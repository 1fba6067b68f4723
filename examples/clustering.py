"""Clustering: sorts texts by subject, without being told the subjects.

    python examples/clustering.py

Needs a running server (`make serve`), and `pip install openai numpy`.
"""

import os

import numpy as np
from openai import OpenAI

URL = os.environ.get("EMBEDSERVE_URL", "http://127.0.0.1:8000")
MODEL = "all-MiniLM-L6-v2"
CLUSTERS = 3

HEADLINES = [
    "Striker scores twice in the cup final",
    "Central bank leaves interest rates unchanged",
    "Storm brings heavy rain to the coast",
    "Goalkeeper signs a new contract with the club",
    "Inflation falls for the third month in a row",
    "Snow expected in the mountains at the weekend",
    "Coach resigns after a defeat in the derby",
    "Shares rise as banks report higher profits",
    "Heat wave breaks temperature records in the south",
    "National team wins its opening match",
    "Government plans to borrow less next year",
    "Fog delays the morning, sunshine in the afternoon",
]


def k_means(vectors: np.ndarray, clusters: int, rounds: int = 20) -> np.ndarray:
    """The cluster of each of [texts, dimensions] unit vectors. Starts from texts that lie far apart."""
    chosen = [int((vectors @ vectors.sum(axis=0)).argmin())]
    while len(chosen) < clusters:
        chosen.append(int((vectors @ vectors[chosen].T).max(axis=1).argmin()))
    centres = vectors[chosen]
    for _ in range(rounds):
        members = (vectors @ centres.T).argmax(axis=1)
        centres = np.stack([vectors[members == cluster].sum(axis=0) for cluster in range(clusters)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return (vectors @ centres.T).argmax(axis=1)


def main() -> None:
    """Print each cluster under the text nearest to its centre."""
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("EMBEDSERVE_KEY", "none"))
    answer = client.embeddings.create(model=MODEL, input=HEADLINES)
    vectors = np.array([item.embedding for item in answer.data])
    members = k_means(vectors, CLUSTERS)
    for cluster in range(CLUSTERS):
        inside = np.flatnonzero(members == cluster)
        nearest_first = inside[(vectors[inside] @ vectors[inside].sum(axis=0)).argsort()[::-1]]
        print(f"like {HEADLINES[nearest_first[0]]!r}:")
        for index in nearest_first:
            print(f"  {HEADLINES[index]}")


if __name__ == "__main__":
    main()
