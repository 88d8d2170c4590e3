"""One item ahead, in a thread that always ends."""

from __future__ import annotations

import threading
import time
import traceback

import pytest

from softcurve.fit.data.row_source import read_ahead


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")] == []


class Reader:
    """Counts that remember how far they were read and whether they were closed."""

    def __init__(self, count, seconds=0.0, fail_at=None):
        self.count, self.seconds, self.fail_at = count, seconds, fail_at
        self.begun, self.closed, self.threads = 0, False, set()
        self.more = threading.Condition()

    def items(self):
        try:
            for item in range(self.count):
                self.threads.add(threading.current_thread())
                with self.more:
                    self.begun = item + 1
                    self.more.notify_all()
                time.sleep(self.seconds)
                if item == self.fail_at:
                    raise OSError(f"item {item} is damaged")
                yield item
        finally:
            self.closed = True

    def waits_for(self, begun):
        """Whether so many items are begun before long; waits for as many."""
        with self.more:
            return self.more.wait_for(lambda: self.begun >= begun, timeout=60)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_the_items_are_those_of_the_iterator(count):
    reader = Reader(count)
    assert list(read_ahead(reader.items())) == list(range(count))
    assert reader.closed
    assert threading.main_thread() not in reader.threads


def test_one_item_ahead_and_no_more():
    """The next item is read while the present one is used, and the one after it is not begun."""
    reader = Reader(10)
    for item in read_ahead(reader.items()):
        assert reader.waits_for(min(item + 2, 10))
        time.sleep(0.01)  # in which a reader without bounds would go on
        assert reader.begun == min(item + 2, 10)


def test_two_buffers_taken_in_turn_are_enough():
    def blocks():
        buffers = [[0] * 1000, [0] * 1000]
        for item in range(40):
            buffer = buffers[item % 2]
            for place in range(1000):
                buffer[place] = item
            yield buffer

    for item, buffer in enumerate(read_ahead(blocks())):
        time.sleep(0.001)
        assert set(buffer) == {item}


def test_an_error_arrives_where_the_item_would_with_its_traceback():
    reader = Reader(5, fail_at=3)
    walk = read_ahead(reader.items())
    assert [next(walk), next(walk), next(walk)] == [0, 1, 2]
    with pytest.raises(OSError, match="item 3 is damaged") as caught:
        next(walk)
    assert "in items" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert reader.closed


def test_a_consumer_that_stops_early_ends_the_thread():
    reader = Reader(1000)
    for item in read_ahead(reader.items()):
        if item == 4:
            break
    assert reader.closed
    assert reader.begun <= 6
    unused = Reader(3)
    walk = read_ahead(unused.items())
    walk.close()  # before the first item
    assert unused.begun == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_consumer_ends_the_thread(error):
    reader = Reader(1000)

    def consume():
        for item in read_ahead(reader.items()):
            if item == 2:
                raise error

    with pytest.raises(error):
        consume()
    assert reader.closed


def test_what_would_end_a_thread_in_silence_is_raised():
    def exits():
        yield 1
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        list(read_ahead(exits()))


def test_an_iterator_without_close():
    assert list(read_ahead(iter([1, 2, 3]))) == [1, 2, 3]
