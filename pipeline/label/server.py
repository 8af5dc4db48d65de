"""The page at which people compare answers, and what it asks of the desk. One HTML file, nothing from the network."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.data.votes import check_annotator
from pipeline.errors import UserError
from pipeline.label.desk import Desk, NotNow
from pipeline.label.drawing import Pair
from pipeline.label.wording import Guidelines, words
from pipeline.language.say import say, spoken

LOOPBACK = "127.0.0.1"
COOKIE = "onebase_label"
LONGEST = 1 << 20
"""Bytes of one request: more is no vote."""


class Page:
    """What a browser may ask for."""

    def __init__(self, desk: Desk, guidelines: Guidelines, password: str) -> None:
        self.desk = desk
        self.guidelines = guidelines
        self.password = password
        self._key = secrets.token_urlsafe(32)
        self._html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def app(self) -> Starlette:
        routes = [
            Route("/", self.open),
            Route("/login", self.log_in, methods=["POST"]),
            Route("/next", self.answer, methods=["POST"]),
            Route("/vote", self.answer, methods=["POST"]),
            Route("/undo", self.answer, methods=["POST"]),
        ]
        # Another site's page could point a name of its own at this machine; only the machine's own names are answered.
        hosts = ["*"] if self.password else [LOOPBACK, "localhost"]
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])

    def _known(self, request: Request) -> bool:
        given = request.cookies.get(COOKIE, "").encode()
        return not self.password or secrets.compare_digest(given, self._key.encode())

    async def open(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        known, wrong = self._known(request), "wrong" in request.query_params
        guidelines, rows = (self.guidelines.html, self.guidelines.rows) if known else ("", [])
        told = {"words": words(), "locked": not known, "rows": rows, "wrong": wrong}
        page = self._html.replace("{{nonce}}", nonce).replace("{{lang}}", "zh" if spoken() == "zh" else "en")
        page = page.replace("{{guidelines}}", guidelines)
        page = page.replace("{{told}}", json.dumps(told, ensure_ascii=False).replace("<", "\\u003c"))
        own = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        own += "img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": own, "Cache-Control": "no-store"})

    async def log_in(self, request: Request) -> Response:
        try:
            body = await _read(request)
        except UserError as error:
            return JSONResponse({"told": str(error)}, 400)
        given = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
        if not secrets.compare_digest(given.encode(), self.password.encode()):
            await asyncio.sleep(1)  # so that nobody tries many
            return RedirectResponse("/?wrong", 303)
        reply = RedirectResponse("/", 303)
        reply.set_cookie(COOKIE, self._key, httponly=True, samesite="strict")
        return reply

    async def answer(self, request: Request) -> Response:
        """The next pair; after a vote or an undo, once that is on the disk."""
        if not self._known(request):
            return JSONResponse({"told": say("Log in again: the server was started anew.")}, 401)
        # A form of another site can be sent here without asking, JSON cannot.
        if request.headers.get("content-type") != "application/json":
            return JSONResponse({"told": "application/json"}, 415)
        try:
            given = json.loads(await _read(request))
            annotator = check_annotator(str(given["annotator"]))
            reply = self._do(request.url.path, annotator, given)
        except NotNow as error:
            reply = {"told": str(error), **self._shown(annotator, self.desk.next(annotator))}
        except (UserError, OSError) as error:
            return JSONResponse({"told": str(error)}, 400)
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"told": "400"}, 400)
        return JSONResponse(reply)

    def _do(self, path: str, annotator: str, given: dict[str, Any]) -> dict[str, Any]:
        if path == "/vote":
            vote = self.desk.vote(annotator, given)
            told = " ".join(filter(None, [say("Saved."), self.desk.favourite(vote)]))
            return {"saved": vote.id, "told": told, **self._shown(annotator, self.desk.next(annotator))}
        if path == "/undo":
            back = self.desk.undo(annotator, str(given["id"]))
            told = say("Taken back.") if back else say("There is nothing to take back.")
            return {"told": told, **self._shown(annotator, self.desk.next(annotator, back.pair if back else ""))}
        return self._shown(annotator, self.desk.next(annotator))

    def _shown(self, annotator: str, pair: Pair | None) -> dict[str, Any]:
        """A pair as the page shows it: nothing in it says which stage gave which answer."""
        shown = None
        if pair is not None:
            prompt = pair.prompt if isinstance(pair.prompt, list) else [{"role": "user", "content": pair.prompt}]
            turns = [{"role": turn["role"], "text": turn.get("content") or ""} for turn in prompt]
            answers = [pair.candidates[place].text for place in self.desk.order(annotator, pair)]
            shown = {"name": pair.name, "prompt": turns, "answers": answers}
        drawer = self.desk.drawer
        waiting = pair is None and not drawer.finished and not self.desk.full
        return {
            "pair": shown,
            "waiting": waiting,
            "failed": drawer.failed if waiting else "",
            "full": say("This round has its labels. Thank you.") if pair is None and self.desk.full else "",
            "progress": self.desk.progress(annotator),
        }


async def _read(request: Request) -> bytes:
    """What was sent. No more is kept of it than a vote has: whoever reaches the page, with the password or without,
    could fill the memory otherwise. Raises UserError where there was more."""
    kept, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        kept += part[: LONGEST - len(kept)]
    if size > LONGEST:
        raise UserError(f"the page sent {size} bytes; a vote has at most {LONGEST}")
    return bytes(kept)


def listen(host: str, port: int) -> socket.socket:
    """A socket on a port; 0 takes a free one. Raises UserError where it is taken."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # who reads the address may open it at once
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"port {port} of {host} cannot be used: {error}; name another with --port") from None
    return listening


def serve(page: Page, listening: socket.socket) -> None:
    """Until Ctrl-C."""
    config = uvicorn.Config(page.app(), log_level="error", lifespan="off", server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
