// Embeds the texts given as arguments with the client's defaults; prints the vectors as JSON.
// Reads OPENAI_BASE_URL, OPENAI_API_KEY and MODEL from the environment.
import OpenAI from "openai";

const client = new OpenAI();
const answer = await client.embeddings.create({ model: process.env.MODEL, input: process.argv.slice(2) });
console.log(JSON.stringify(answer.data.map((item) => item.embedding)));
