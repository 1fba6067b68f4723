"""From OpenAI to your own server: two lines change.

    -  client = OpenAI()
    -  MODEL = "text-embedding-3-small"
    +  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=os.environ.get("EMBEDSERVE_KEY", "none"))
    +  MODEL = "all-MiniLM-L6-v2"

The second one may stay, too, where the operator made an alias of the name (`catalogue.toml`). Vectors of another model
are other vectors, of another size: what is stored has to be embedded again, with the same model as the queries.

    python examples/migrate_from_openai.py

Needs a running server (`make serve`), and `pip install openai`.
"""

import os

from openai import OpenAI

URL = os.environ.get("EMBEDSERVE_URL", "http://127.0.0.1:8000")

client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("EMBEDSERVE_KEY", "none"))
MODEL = "all-MiniLM-L6-v2"

texts = ["A man is eating food.", "Someone is having a meal.", "The train leaves at nine."]
answer = client.embeddings.create(model=MODEL, input=texts)

print(f"{len(answer.data)} vectors of {len(answer.data[0].embedding)}, {answer.usage.prompt_tokens} tokens")
first = answer.data[0].embedding
for text, item in zip(texts[1:], answer.data[1:], strict=True):
    cosine = sum(a * b for a, b in zip(first, item.embedding, strict=True))
    print(f"{cosine:.2f}  {texts[0]} / {text}")
