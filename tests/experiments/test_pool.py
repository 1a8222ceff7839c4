"""The pool of subprocesses, on processes that only take time."""

import signal

import pytest

from experiments.processes import pool
from lightning_modules.callbacks.signals import ORDER


class Acted:
    """Ends with `code` after `polls` looks at it, or with 75 after a signal."""

    def __init__(self, code, polls):
        self.code, self.polls, self.signals = code, polls, []

    def poll(self):
        self.polls -= 1
        return 75 if self.signals else self.code if self.polls <= 0 else None

    def send_signal(self, signum):
        self.signals.append(signum)


@pytest.fixture
def run(monkeypatch):
    """run(jobs, ...) -> (pool, ended, processes, code); a job is (exit code, polls)."""
    monkeypatch.setattr(pool, "POLL_SECONDS", 0)
    monkeypatch.setattr(pool.notice, "asked", 0)

    def running(jobs, slots=1, ended=lambda code: code, deadline=None, together=True, watch=lambda child: None):
        left, over, processes = [*enumerate(jobs)], [], {}

        def start(argv, env, log):
            processes[argv[0]] = Acted(*jobs[argv[0]])
            processes[argv[0]].slot = env["SLOT"]
            return processes[argv[0]]

        monkeypatch.setattr(pool, "start", start)
        made = pool.Pool([{"SLOT": str(k)} for k in range(slots)], deadline, stop_together=together)

        def start_next():
            if not left:
                return None
            job = left.pop(0)[0]
            made.start(job, [job], {}, None)
            return 0

        def has_ended(child, returned):
            over.append((child.job, returned))
            return ended(returned)

        made.ended, made.processes = over, processes
        made.go = lambda: made.run(start_next, has_ended, watch)
        return made

    return running


def test_a_slot_is_used_again_and_never_twice_at_once(run):
    made = run([(0, 1), (0, 5), (0, 1), (0, 1)], slots=2)
    assert made.go() == 0 and sorted(made.ended) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [made.processes[k].slot for k in range(4)] == ["0", "1", "0", "0"]


@pytest.mark.parametrize("together", [True, False])
def test_a_code_starts_nothing_more_and_ends_the_others_where_they_stop_together(run, together):
    made = run([(3, 2), (0, 9), (0, 1)], slots=2, together=together)
    assert made.go() == 3 and 2 not in made.processes
    assert made.ended == [(0, 3), (1, 75 if together else 0)]
    assert made.processes[1].signals == [signal.SIGTERM] * together


def test_a_signal_is_forwarded_once_to_all(run):
    def ask(child):
        pool.notice.asked = 1 + ORDER.index(signal.SIGINT)

    made = run([(0, 9), (0, 9), (0, 9)], slots=2, ended=lambda code: 0, watch=ask)
    assert made.go() == 0 and len(made.processes) == 2
    assert all(process.signals == [signal.SIGINT] for process in made.processes.values())


def test_when_the_time_is_over_what_runs_is_asked_to_save(run):
    made = run([(0, 9), (0, 9)], ended=lambda code: 0, deadline=0.0)
    assert made.go() == 0 and made.time_left == 0
    assert made.ended == [(0, 75)] and made.processes[0].signals == [signal.SIGTERM] and made.asked


def test_an_error_of_the_caller_leaves_no_process_running(run):
    def fail(child):
        raise ValueError("no such metric")

    made = run([(0, 9), (0, 9)], slots=2, watch=fail)
    with pytest.raises(ValueError, match="no such metric"):
        made.go()
    assert all(process.signals == [signal.SIGTERM] for process in made.processes.values()) and len(made.processes) == 2
