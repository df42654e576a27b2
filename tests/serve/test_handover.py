"""From one thread's calls to another thread's loop: all of them, in order, and few times woken."""

import asyncio
import threading

from glade.serve.handover import Handover, handover_to


def test_calls_of_many_threads_arrive_in_each_one_s_order() -> None:
    came: list[tuple[int, int]] = []

    async def hear() -> None:
        handover = handover_to(asyncio.get_running_loop())

        def ask(thread: int) -> None:
            for i in range(2000):
                handover.call(lambda i=i: came.append((thread, i)))

        threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        while len(came) < 8000:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(hear(), 60))
    for thread in range(4):
        assert [i for who, i in came if who == thread] == list(range(2000))


def test_a_loop_is_woken_once_for_all_that_came() -> None:
    woken: list[object] = []

    async def hear() -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (woken.append(args), wake(*args))[1]  # type: ignore[method-assign]
        handover, came = Handover(loop), []
        for turn in range(3):
            for i in range(64):
                handover.call(lambda i=i: came.append(i))
            await asyncio.sleep(0)
            assert came == list(range(64)) * (turn + 1)

    asyncio.run(hear())
    assert len(woken) == 3


def test_a_closed_loop_hears_nothing() -> None:
    loop = asyncio.new_event_loop()
    handover = handover_to(loop)
    assert handover_to(loop) is handover
    loop.close()
    handover.call(lambda: print("never"))
    assert not handover._calls
