"""Talk to a server with LangChain's OpenAI clients: `talk_with_langchain.py URL MODEL PROMPT`. Prints JSON."""

from __future__ import annotations

import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

url, model, prompt = sys.argv[1:]
server = {"base_url": url, "api_key": "none", "model": model, "temperature": 0, "max_tokens": 12, "max_retries": 0}
text, chat = OpenAI(**server), ChatOpenAI(**server)
first = chat.invoke([SystemMessage("Be short."), HumanMessage(prompt)])
history = [HumanMessage(prompt), first, AIMessage(""), HumanMessage([{"type": "text", "text": prompt}])]
stop = text.invoke(prompt)[3:6]
print(
    json.dumps(
        {
            "text": text.invoke(prompt),
            "text_streamed": "".join(text.stream(prompt)),
            "text_stopped": text.invoke(prompt, stop=[stop]),
            "stop": stop,
            "texts": text.batch([prompt, "x"]),
            "generations": [one[0].text for one in text.generate([prompt, "x"]).generations],
            "chat": first.content,
            "chat_streamed": "".join(
                chunk.content for chunk in chat.stream([SystemMessage("Be short."), HumanMessage(prompt)])
            ),
            "chat_tokens": first.usage_metadata["output_tokens"],
            "history_tokens": chat.invoke(history).usage_metadata["input_tokens"],
        }
    )
)
