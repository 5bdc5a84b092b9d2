#!/usr/bin/env python3
"""An engine without a model, for tests of a fleet: OpenAI-shaped, with a start time, stages, and a rate of tokens.

Its tokens are a function of all tokens before them, so that a stream that was continued can be told from one that was
not. FAKE_ENGINE in the environment says how it behaves, as JSON; so does behaviour.json beside the checkpoint's
manifest, which comes first. The file is read again for every step: a test holds an engine with it, and lets it go on.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from aiohttp import web

BEHAVIOUR = "behaviour.json"
DEFAULTS = {
    "fails": False,  # whether it ends instead of starting
    "starts": True,  # False: it does not listen until this is True
    "start": 0.3,  # seconds
    "stage_seconds": [0.0, 0.5, 1.0],
    "stage": None,  # the last one that comes; None: all do
    "token_seconds": 0.02,
    "tokens": None,  # of an answer, after which it waits; None: it does not
    "detokenize": True,  # False: it answers with an error
}
HELD_SECONDS = 0.02  # how often whoever waits looks at the file
VOCABULARY = 50000


def next_token(tokens: list[int]) -> int:
    state = 17
    for token in tokens[-64:]:
        state = (state * 1103515245 + token + 12345) % (1 << 31)
    return state % VOCABULARY


def text_of(token: int) -> str:
    return f" t{token}"


def tokens_of(text: str) -> list[int]:
    return [sum(word.encode()) % VOCABULARY for word in text.split()] or [1]


class FakeEngine:
    def __init__(self, args: argparse.Namespace):
        self.args, self.defaults = args, DEFAULTS | json.loads(os.environ.get("FAKE_ENGINE", "{}"))
        self.listening = time.monotonic()
        self.last = len(self.defaults["stage_seconds"])
        self.answering = 0

    def behaves(self, name: str):
        behaviour = {}
        with contextlib.suppress(FileNotFoundError):
            behaviour = json.loads((self.args.checkpoint / BEHAVIOUR).read_text())
        return behaviour.get(name, self.defaults[name])

    def stage(self) -> int:
        since = time.monotonic() - self.listening
        stage = sum(seconds <= since for seconds in self.behaves("stage_seconds"))
        return min(stage, self.behaves("stage") or self.last)

    def quality(self, began: int) -> dict:
        """What progressive_serve.py says of an answer at its end."""
        return {"progressive_stage": self.stage(), "progressive_exact": began == self.last}

    async def next_step(self, number: int) -> None:
        """Waits as long as the token with this number takes, from 0 on."""
        await asyncio.sleep(self.behaves("token_seconds"))
        while (most := self.behaves("tokens")) is not None and number >= most:
            await asyncio.sleep(HELD_SECONDS)

    async def progress(self, _) -> web.Response:
        stage = self.stage()
        stages = [
            {"stage": number, "bytes": 100, "bytes_loaded": 100 if number <= stage else 0}
            for number in range(1, self.last + 1)
        ]
        timeline = [{"event": "ready", "seconds": self.behaves("start")}]
        found = {"stage": stage, "num_stages": self.last, "min_stage": 1, "stages": stages, "timeline": timeline}
        return web.json_response(found | {"answering": self.answering})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.answering += 1
        try:
            return await self.answer(request)
        finally:
            self.answering -= 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if (key := os.environ.get("VLLM_API_KEY")) and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": {"message": "no key", "code": 401}}, status=401)
        body = await request.json()
        chat = request.path.endswith("chat/completions")
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        source = body["messages"][-1]["content"] if chat else body["prompt"]
        prompt = given or (tokens_of(source) if isinstance(source, str) else source)
        wanted = request.headers.get("X-Progressive-Min-Stage", "1")
        wanted = self.last if wanted == "last" else int(wanted)
        while self.stage() < wanted:
            await asyncio.sleep(HELD_SECONDS)
        tokens, count = list(prompt), body.get("max_tokens") or 16
        began = self.stage()
        headers = {"X-Progressive-Stage": str(began)}
        if not body.get("stream"):
            for number in range(count):
                await self.next_step(number)
                tokens.append(next_token(tokens))
            text = "".join(map(text_of, tokens[len(prompt) :]))
            choice = {"index": 0, "finish_reason": "length"}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
            answer = {"id": "whole", "choices": [choice], "usage": usage} | self.quality(began)
            return web.json_response(answer, headers=headers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", **headers})
        await response.prepare(request)  # as vLLM does, before there is a token

        async def send(**event) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        identity = {"id": f"fake-{os.getpid()}-{time.monotonic_ns()}", "created": int(time.time())}
        ids = body.get("return_token_ids")
        if chat:
            event = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
            await send(**identity, **event, **({"prompt_token_ids": prompt} if ids else {}))
        for number in range(1, count + 1):
            await self.next_step(number - 1)
            tokens.append(next_token(tokens))
            text = text_of(tokens[-1])
            choice = {"index": 0, "finish_reason": "length" if number == count else None}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            if ids:
                choice["token_ids"] = [tokens[-1]]
                if number == 1 and not chat:
                    choice["prompt_token_ids"] = prompt
            ends = self.quality(began) if number == count else {}
            await send(**identity, sent=time.time(), choices=[choice], **ends)
        if (body.get("stream_options") or {}).get("include_usage"):
            await send(**identity, choices=[], usage={"prompt_tokens": len(prompt), "completion_tokens": count})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def detokenize(self, request: web.Request) -> web.Response:
        if not self.behaves("detokenize"):
            return web.json_response({"error": {"message": "it fails", "code": 500}}, status=500)
        return web.json_response({"prompt": "".join(map(text_of, (await request.json())["tokens"]))})

    async def run(self) -> None:
        app = web.Application()
        app.router.add_get("/progress", self.progress)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/detokenize", self.detokenize)
        grace = self.args.shutdown_timeout
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=grace)
        await runner.setup()
        await web.TCPSite(runner, self.args.host, self.args.port).start()
        self.listening = time.monotonic()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await ended.wait()
        await runner.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--shutdown-timeout", type=float, default=0.1)
    parser.add_argument("--served-model-name")
    args, _ = parser.parse_known_args()
    engine = FakeEngine(args)
    if engine.behaves("fails"):
        print("error: this engine does not start", file=sys.stderr)
        return 2
    time.sleep(engine.behaves("start"))
    while not engine.behaves("starts"):
        time.sleep(HELD_SECONDS)
    asyncio.run(engine.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
