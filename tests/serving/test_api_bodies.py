"""Bodies that arrive at the same time share a bounded room."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from serving.api.bodies import Room, read_body
from serving.api.errors import ApiError
from serving.settings import Limits

LIMITS = Limits(body_bytes=1024, body_seconds=1.0, queue=1, concurrency=1)


class Upload:
    """A request whose body comes as the test sends it."""

    def __init__(self, room: Room) -> None:
        self.room, self.parts = room, asyncio.Queue[dict[str, Any]]()
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> bytes:
        with self.room.share() as take:
            return await read_body(Request({"type": "http", "headers": []}, self.parts.get), LIMITS, take)

    async def send(self, count: int, more: bool = True) -> None:
        self.parts.put_nowait({"type": "http.request", "body": b" " * count, "more_body": more})
        await asyncio.sleep(0.01)

    async def status(self) -> int:
        with pytest.raises(ApiError) as error:
            await self.task
        return error.value.status


def test_bodies_that_never_end_hold_no_more_than_a_full_queue_would() -> None:
    async def run() -> None:
        room = Room(LIMITS)
        slow = [Upload(room) for _ in range(2)]
        for upload in slow:
            await upload.send(1000)
        late = Upload(room)
        await late.send(48)
        await late.send(1)
        assert await late.status() == 429, "of 2048 bytes 2000 are taken, and 48"
        small = Upload(room)
        await small.send(48, more=False)
        assert await small.task == b" " * 48
        assert [await upload.status() for upload in slow] == [408, 408]
        last = [Upload(room) for _ in range(2)]
        for upload in last:
            await upload.send(1024, more=False)
        assert [len(await upload.task) for upload in last] == [1024, 1024], "all room is given back"

    asyncio.run(run())
