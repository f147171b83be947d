"""Which task a node gets next."""

import random
from collections import Counter, defaultdict

import pytest

from p48ray.runner.dispatch import Dispatcher
from p48ray.stages.tasks import Task


def task(layer: int | None, name: str, load: float = 1.0) -> Task:
    return Task(stage="compress", id=name, item=None, layer=layer, load=load)


def layer_of_tasks(layer: int, *loads: float) -> list[Task]:
    return [task(layer, f"L{layer}-{n}", load) for n, load in enumerate(loads)]


def drain(waiting: Dispatcher, node: str) -> list[str]:
    taken = []
    while (got := waiting.take(node)) is not None:
        taken.append(got.id)
    return taken


def test_layers_tasks_come_heaviest_first() -> None:
    assert drain(Dispatcher(layer_of_tasks(1, 5, 9, 1, 7)), "a") == ["L1-1", "L1-3", "L1-0", "L1-2"]


def test_node_finishes_a_layer_before_it_begins_the_next_lighter_one() -> None:
    tasks = layer_of_tasks(1, 1, 2) + layer_of_tasks(2, 8, 9) + layer_of_tasks(3, 5, 5, 1)
    assert [name[:2] for name in drain(Dispatcher(tasks), "a")] == [
        "L2",
        "L2",
        "L3",
        "L3",
        "L3",
        "L1",
        "L1",
    ]


def test_each_node_gets_the_heaviest_layer_that_nobody_has() -> None:
    waiting = Dispatcher(
        layer_of_tasks(1, 3, 3) + layer_of_tasks(2, 9, 9) + layer_of_tasks(3, 5, 5)
    )
    first = {node: waiting.take(node).layer for node in "abc"}  # type: ignore[union-attr]
    assert first == {"a": 2, "b": 3, "c": 1}
    assert {node: waiting.take(node).layer for node in "cab"} == first  # type: ignore[union-attr]


def test_layers_of_one_weight_are_taken_from_the_lowest() -> None:
    waiting = Dispatcher([t for n in (3, 1, 2) for t in layer_of_tasks(n, 4, 4)])
    assert [waiting.take(node).layer for node in "abc"] == [1, 2, 3]  # type: ignore[union-attr]


def test_node_joins_another_only_when_no_layer_is_unowned() -> None:
    """However heavy the one that others work on."""
    waiting = Dispatcher(
        layer_of_tasks(1, 1e5, 1e5, 1e5) + layer_of_tasks(2, 1.0) + layer_of_tasks(3, 2.0)
    )
    assert [waiting.take(node).id for node in "abcd"] == ["L1-2", "L3-0", "L2-0", "L1-1"]  # type: ignore[union-attr]


def test_layer_nobody_has_comes_first_though_its_tasks_saw_no_token() -> None:
    """Kimi's layers hold 8 million routed tokens and more, its rarest experts none."""
    waiting = Dispatcher(layer_of_tasks(1, *[350e3] * 48) + layer_of_tasks(2, 0.0))
    assert [waiting.take(node).layer for node in "ab"] == [1, 2]  # type: ignore[union-attr]


def test_joining_node_takes_the_layer_with_the_most_left_for_each_node_on_it() -> None:
    waiting = Dispatcher(layer_of_tasks(1, *[10] * 9) + layer_of_tasks(2, *[10] * 7))
    for node in ("a", "b", "c"):  # a on the first, b on the second, c joins: 80 / 2 against 60 / 2
        waiting.take(node)
    assert (waiting.nodes[1], waiting.nodes[2]) == ({"a", "c"}, {"b"})
    waiting.take("d")  # 70 / 3 against 60 / 2
    assert (waiting.nodes[1], waiting.nodes[2]) == ({"a", "c"}, {"b", "d"})


def test_task_put_back_waits_behind_the_rest_of_its_layer() -> None:
    waiting = Dispatcher(layer_of_tasks(1, 9, 5, 1) + layer_of_tasks(2, 2))
    poison = waiting.take("a")
    assert poison is not None
    waiting.put_back(poison)
    assert len(waiting) == 4
    assert drain(waiting, "a") == ["L1-1", "L1-2", "L1-0", "L2-0"]


def test_two_tasks_put_back_come_in_the_order_in_which_they_failed() -> None:
    waiting = Dispatcher(layer_of_tasks(1, 9, 8, 1))
    first, second = waiting.take("a"), waiting.take("a")
    assert first is not None and second is not None
    waiting.put_back(first)
    waiting.put_back(second)
    assert drain(waiting, "a") == ["L1-2", "L1-0", "L1-1"]


def test_layer_of_a_node_that_is_gone_is_free_again() -> None:
    """For a node that comes after it, before layers that others have."""
    waiting = Dispatcher(layer_of_tasks(1, 3, 3, 3) + layer_of_tasks(2, 9, 9, 9))
    assert [waiting.take(node).layer for node in "ab"] == [2, 1]  # type: ignore[union-attr]
    waiting.forget("b")
    assert [waiting.take("c").layer, waiting.take("c").layer] == [1, 1]  # type: ignore[union-attr]
    waiting.forget("nobody")
    assert drain(waiting, "c") == ["L2-1", "L2-0"]


def test_tasks_without_a_layer_are_anybodys_heaviest_first() -> None:
    waiting = Dispatcher([task(None, "x", 1), task(None, "y", 2), task(None, "z", 3)])
    assert [waiting.take(node).id for node in "aba"] == ["z", "y", "x"]  # type: ignore[union-attr]


def test_nothing_waits_in_an_empty_dispatcher() -> None:
    waiting = Dispatcher([])
    assert (len(waiting), bool(waiting), waiting.take("a")) == (0, False, None)


@pytest.mark.parametrize("seed", range(20))
def test_every_task_is_handed_out_once_and_once_more_for_each_time_it_was_put_back(
    seed: int,
) -> None:
    chance = random.Random(seed)
    tasks = [
        task(chance.choice([None, 1, 2, 3]), f"t{n}", chance.choice([0, 1, 10])) for n in range(60)
    ]
    waiting, handed, returned = Dispatcher(tasks), Counter[str](), Counter[str]()
    while waiting:
        size, got = len(waiting), waiting.take(chance.choice("abcde"))
        assert got is not None and len(waiting) == size - 1
        handed[got.id] += 1
        if chance.random() < 0.2:
            waiting.put_back(got)
            returned[got.id] += 1
        if chance.random() < 0.1:
            waiting.forget(chance.choice("abcde"))
    assert waiting.take("a") is None
    assert handed == Counter(t.id for t in tasks) + returned


def simulate(
    num_nodes: int, workers_a_node: int, num_layers: int, units_a_layer: int, seed: int = 0
) -> tuple[set[tuple[str, int]], float]:
    """Which node worked on which layer, and when the last unit was done, as a share of the ideal.
    Loads as routed tokens are: skewed."""
    chance = random.Random(seed)
    tasks = [
        task(n, f"L{n:02d}-{u:02d}", chance.lognormvariate(0, 0.5))
        for n in range(num_layers)
        for u in range(units_a_layer)
    ]
    waiting, pairs, now = Dispatcher(tasks), set[tuple[str, int]](), 0.0
    busy = [(0.0, f"n{n}") for n in range(num_nodes) for _ in range(workers_a_node)]
    while waiting:
        busy.sort()
        start, node = busy.pop(0)
        got = waiting.take(node)
        assert got is not None and got.layer is not None
        pairs.add((node, got.layer))
        busy.append((start + got.load, node))
        now = max(now, start + got.load)
    return pairs, now / (sum(t.load for t in tasks) / (num_nodes * workers_a_node))


@pytest.mark.parametrize(
    ("num_nodes", "num_layers"), [(1, 60), (4, 60), (8, 60), (16, 60), (59, 60)]
)
def test_layers_are_read_by_one_node_each_until_the_last_ones_are_shared(
    num_nodes: int, num_layers: int
) -> None:
    pairs, late = simulate(num_nodes, 8, num_layers, 48)
    assert {layer for _, layer in pairs} == set(range(num_layers))
    assert len(pairs) <= num_layers + 2 * num_nodes
    assert late < 1.25


@pytest.mark.parametrize(
    ("num_nodes", "num_layers"), [(8, 4), (16, 4), (16, 15), (64, 8), (64, 60)]
)
def test_more_nodes_than_layers_do_not_thrash(num_nodes: int, num_layers: int) -> None:
    """Each node reads two or three layers, not all of them (with 64 nodes and 60 layers that would
    be 3,840)."""
    pairs, late = simulate(num_nodes, 2, num_layers, 48)
    assert len(pairs) <= 3 * num_nodes
    shared = defaultdict(set)
    for node, layer in pairs:
        shared[layer].add(node)
    assert max(map(len, shared.values())) <= 3 * num_nodes / num_layers + 4
    assert late < 1.2


def test_streams_go_before_units_and_so_do_their_next_attempts() -> None:
    waiting = Dispatcher([*layer_of_tasks(1, 1e9, 1e9), task(None, "stream", 0)])
    stream = waiting.take("a")
    assert stream is not None and stream.id == "stream"
    assert waiting.take("a").layer == 1  # type: ignore[union-attr]
    waiting.put_back(stream)
    assert drain(waiting, "a") == ["stream", "L1-0"]


def test_tasks_that_come_later_are_handed_out_like_those_that_were_there() -> None:
    """The node that works on a layer goes on with it; the next node takes the new one, heaviest
    unit first."""
    waiting = Dispatcher(layer_of_tasks(1, 3, 3, 3))
    assert waiting.take("a").layer == 1  # type: ignore[union-attr]
    waiting.add(layer_of_tasks(2, 5, 9, 1))
    assert [waiting.take(node).id for node in "aba"] == ["L1-1", "L2-1", "L1-0"]  # type: ignore[union-attr]
    waiting.add([task(1, "late", 100.0)])
    assert drain(waiting, "b") == ["L2-0", "L2-2", "late"]


def test_task_that_is_taken_ahead_is_the_one_that_take_would_give() -> None:
    tasks = layer_of_tasks(1, 3, 1) + layer_of_tasks(2, 9, 8)
    ahead, waiting = Dispatcher(tasks), Dispatcher(tasks)
    for node in "abab":
        assert ahead.take_ahead(node, ()) == waiting.take(node)
        assert ahead.nodes == waiting.nodes
    assert ahead.take_ahead("a", ()) is None


def test_nothing_is_taken_ahead_of_a_stream_or_of_a_task_that_is_to_be_alone() -> None:
    waiting = Dispatcher([*layer_of_tasks(1, 3, 1), task(None, "stream")])
    assert waiting.take_ahead("a", ()) is None
    assert waiting.take("a") == task(None, "stream")
    assert waiting.take_ahead("a", {"L1-0"}) is None
    assert (len(waiting), waiting.nodes[1]) == (2, set())
    assert [got.id for got in (waiting.take("a"), waiting.take_ahead("a", {"L1-0"})) if got] == [
        "L1-0",
        "L1-1",
    ]
