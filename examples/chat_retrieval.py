"""Retrieval for a chat: the passages that answer a question, put before a language model together with it.

    python examples/chat_retrieval.py "How long may the machine stand still?"

Prints the messages that a chat model would get; any OpenAI-compatible one takes them as they are. Needs a running
server (`make serve`), and `pip install openai numpy`.
"""

import json
import os
import sys

import numpy as np
from openai import OpenAI

URL = os.environ.get("EMBEDSERVE_URL", "http://127.0.0.1:8000")
MODEL = "all-MiniLM-L6-v2"
PASSAGES = 2

HANDBOOK = """\
Switch the coffee machine on with the button at its back. The lamp blinks while the water heats up and stays on when the
machine is ready, after about forty seconds.

Use fresh, cold drinking water and change it every day. Sparkling water, milk and hot water must not go into the tank.

Descale the machine when the orange lamp lights up, or every three months. Dissolve one sachet of citric acid in a litre
of water, fill it into the tank, and hold the steam button for five seconds.

If the machine is not used for more than a week, empty the tank and the drip tray, and let one cup of water run through
before the next coffee.

Coffee that is too weak was ground too coarsely: turn the ring of the grinder to the left, one notch at a time, and only
while the grinder is running.

The guarantee covers faults of the material for two years. Damage by limescale is not covered.
"""


def embed(client: OpenAI, texts: list[str], input_type: str) -> np.ndarray:
    """Unit vectors, [texts, dimensions]."""
    answer = client.embeddings.create(model=MODEL, input=texts, extra_body={"input_type": input_type})
    return np.array([item.embedding for item in answer.data])


def messages(question: str, passages: list[str]) -> list[dict[str, str]]:
    """What a chat model is sent: it is to answer from the numbered passages, and say so when they do not tell."""
    context = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, 1))
    return [
        {
            "role": "system",
            "content": "Answer from the passages of the handbook below, and name the number of the one you use. "
            f"If none of them has the answer, say that the handbook does not tell.\n\n{context}",
        },
        {"role": "user", "content": question},
    ]


def main() -> None:
    """Print the assembled messages."""
    question = " ".join(sys.argv[1:]) or "I'm going on holiday. What should I do with the machine?"
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("EMBEDSERVE_KEY", "none"))
    passages = [" ".join(paragraph.split()) for paragraph in HANDBOOK.split("\n\n")]
    scores = embed(client, passages, "document") @ embed(client, [question], "query")[0]
    nearest = [passages[index] for index in scores.argsort()[::-1][:PASSAGES]]
    print(json.dumps(messages(question, nearest), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
