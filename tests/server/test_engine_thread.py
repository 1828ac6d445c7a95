"""One thread owns the engine: what it takes, what it hands over, and how everything ends."""

import asyncio
import functools
import threading

import pytest

from mor.engine import SamplingParams
from mor.server.engine_thread import EngineThread, Job
from mor.server.errors import ApiError
from mor.server.metrics import Metrics
from tests.engine.requests import all_memory_is_back
from tests.server.served import SLOTS, make_engine


def in_loop(test):
    """Run a test in an event loop, with a thread that it gets."""

    @functools.wraps(test)
    def run():
        asyncio.run(_with_thread(test))

    del run.__wrapped__  # or pytest asks for its argument
    return run


async def _with_thread(test, make=make_engine, **settings):
    settings = {"max_waiting": 2, "max_unread": 8} | settings
    thread = EngineThread(make, Metrics("tiny"), **settings)
    thread.start()
    engine = await thread.settled()
    try:
        await test(thread)
    finally:
        engine.may_go.set()
        await thread.stop()


def job(prompt="hello", **settings):
    settings = {"max_new_tokens": 5, "temperature": 0} | settings
    return Job(list(prompt.encode()), SamplingParams(**settings))


async def idle(thread):
    engine = await thread.settled()
    while thread.num_unfinished or engine.requests:
        await asyncio.sleep(0.001)
    return engine


async def read(answer, jobs=1):
    """Tokens of each job, as they arrive."""
    found = [[] for _ in range(jobs)]
    while arrived := await answer.arrived():
        for place, output in arrived:
            found[place].append(output.token_id)
    return found


@in_loop
async def test_tokens_arrive_in_order_and_are_those_of_the_engine_alone(thread):
    jobs = [job("a", seed=1, temperature=1.0), job("bcd"), job("efghi", max_new_tokens=7)]
    want = make_engine().generate([j.prompt_ids for j in jobs], [j.params for j in jobs])
    with await thread.submit(jobs, streamed=True) as answer:
        assert await read(answer, 3) == [request.token_ids for request in want]
    with await thread.submit(jobs, streamed=False) as answer:
        found = await answer.finished()
        assert [r.token_ids for r in found] == [r.token_ids for r in want]
    all_memory_is_back(await idle(thread))


@in_loop
async def test_more_than_may_wait_is_refused_and_there_is_room_again_later(thread):
    engine = await thread.settled()
    engine.may_go.clear()
    answer = await thread.submit([job()] * (SLOTS + 1), streamed=False)
    more = await thread.submit([job()], streamed=False)
    with pytest.raises(ApiError, match="6 answers are under way") as refused:
        await thread.submit([job()], streamed=False)
    assert refused.value.status == 429 and 1 <= int(refused.value.headers["Retry-After"]) <= 60
    with pytest.raises(ApiError, match="asks for 7 answers, the server takes 6") as refused:
        await thread.submit([job()] * 7, streamed=False)
    assert refused.value.status == 400
    engine.may_go.set()
    await answer.finished()
    await more.finished()
    await (await thread.submit([job()] * 6, streamed=False)).finished()
    all_memory_is_back(await idle(thread))


@in_loop
async def test_jobs_are_queued_together_or_not_at_all(thread):
    wrong = Job([999], SamplingParams(max_new_tokens=3))
    with pytest.raises(ApiError, match="token ids outside") as refused:
        await thread.submit([job(max_new_tokens=100), wrong], streamed=True)
    assert refused.value.status == 400
    all_memory_is_back(await idle(thread))


@in_loop
async def test_who_does_not_read_is_cut_and_the_others_go_on(thread):
    lazy = await thread.submit([job(max_new_tokens=60)], streamed=True)
    with await thread.submit([job("other", max_new_tokens=40)], streamed=True) as other:
        assert len((await read(other))[0]) == 40
    await idle(thread)
    with pytest.raises(ApiError, match="not read fast enough"):
        await lazy.arrived()
    assert len(lazy.requests[0].token_ids) < 60
    all_memory_is_back(await idle(thread))


@in_loop
async def test_an_answer_that_is_left_has_its_slot_and_pages_back_within_two_steps(thread):
    engine = await thread.settled()
    for streamed in (True, False):
        with await thread.submit([job(max_new_tokens=100)] * 2, streamed=streamed) as answer:
            while len(answer.requests[0].token_ids) < 3:
                await asyncio.sleep(0)
            engine.may_go.clear()
            before = engine.steps
        engine.may_go.set()
        assert thread.num_unfinished == 0
        await idle(thread)
        assert engine.steps <= before + 2
        assert [r.finish_reason for r in answer.requests] == ["abort"] * 2
    all_memory_is_back(engine)


@in_loop
async def test_a_task_that_is_cancelled_before_its_jobs_are_taken_leaves_nothing(thread):
    engine, inside, go_on = await thread.settled(), threading.Event(), threading.Event()
    step = engine.step

    def slow_step():
        inside.set()
        go_on.wait()
        return step()

    engine.step = slow_step
    first = await thread.submit([job()], streamed=False)
    while not inside.is_set():
        await asyncio.sleep(0)
    second = asyncio.create_task(thread.submit([job(max_new_tokens=100)], streamed=False))
    await asyncio.sleep(0)
    assert not second.done()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go_on.set()
    assert len((await first.finished())[0].token_ids) == 5
    all_memory_is_back(await idle(thread))


@in_loop
async def test_draining_lets_answers_end_and_takes_no_others(thread):
    answer = await thread.submit([job()], streamed=False)
    thread.drain()
    with pytest.raises(ApiError, match="shutting down") as refused:
        await thread.submit([job()], streamed=False)
    assert refused.value.status == 503
    assert len((await answer.finished())[0].token_ids) == 5


@in_loop
async def test_all_answers_can_be_ended_from_outside(thread):
    engine = await thread.settled()
    engine.may_go.clear()
    answers = [await thread.submit([job()], streamed=streamed) for streamed in (True, False)]
    thread.abort_all(ApiError(503, "enough"))
    for wait in (answers[0].arrived, answers[1].finished):
        with pytest.raises(ApiError, match="enough"):
            await wait()
    engine.may_go.set()
    all_memory_is_back(await idle(thread))


@in_loop
async def test_a_stopped_engine_ends_every_answer_and_is_told_to_all(thread):
    engine = await thread.settled()
    engine.may_go.clear()
    answer = await thread.submit([job()], streamed=False)

    def broken():
        raise RuntimeError("the device is lost, at /secret/place")

    engine.step = broken
    with pytest.raises(ApiError, match=r"^the engine has stopped$"):
        await answer.finished()
    with pytest.raises(ApiError, match="the engine has stopped; restart") as refused:
        await thread.submit([job()], streamed=False)
    assert refused.value.status == 503 and thread.num_unfinished == 0


def test_an_engine_that_cannot_be_made_says_why():
    async def run():
        def make():
            raise ValueError("no such model")

        thread = EngineThread(make, Metrics("tiny"), max_waiting=1, max_unread=1)
        thread.start()
        with pytest.raises(ApiError, match="being loaded"):
            await thread.submit([job()], streamed=False)
        with pytest.raises(ValueError, match="no such model"):
            await thread.settled()
        with pytest.raises(ApiError, match="the engine has stopped"):
            thread.check_open()

    asyncio.run(run())


@in_loop
async def test_a_request_that_fails_in_the_engine_is_an_error_without_its_reason(thread):
    engine = await thread.settled()
    step = engine.step

    def failing_step():
        for request in list(engine.requests.values()):
            engine._work.fail(request, "bad weights in /secret/place")
        return step()

    engine.step = failing_step
    answer = await thread.submit([job()], streamed=False)
    with pytest.raises(ApiError, match="log has the reason") as failed:
        await answer.finished()
    assert failed.value.status == 500 and "secret" not in str(failed.value)
    with await thread.submit([job()], streamed=True) as answer:
        assert [output.finish_reason for _, output in await answer.arrived()] == ["error"]
