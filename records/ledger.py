"""
A ledger: one error budget over many comparisons, for whoever tries 200 ideas and keeps what is "better".

    entry = open_entry(path, plan, folder, command, arms)   # before the first run: the alpha of this comparison
    close_entry(path, entry.id, {arm: word})                # after the last one: its verdicts
    python -m records.ledger FILE                           # what the ledger says

The hypothesis of a comparison is "no arm is better than the baseline". It is rejected, and the idea kept, where the
verdict is "better". A comparison with alpha_t must keep, on average, at most alpha_t ideas that are not better, however
many looks it comes to that in. "worse" and "equivalent" are no rejections: they earn nothing.

The rule is LORD++ with gamma_j = j^-1.3 / zeta(1.3), W0 = alpha / 2 and alpha = 0.05, and no alpha_t above 0.005, which
is what a comparison without a ledger has on this side of its two-sided test. Every alpha_t is taken from budgets: W0 at
the start, alpha - W0 after the first rejection, alpha after each further one. Therefore the sum of all alpha_t so far
is at most alpha max(1, R) for R rejections, and with V ideas kept that are not better, E[V] <= alpha E[max(1, R)].

An open comparison has its alpha and no outcome. Its alpha counts in that sum from the moment it begins, and it does not
count in R before its verdicts are written: the sum is never too small, R never too large. So any number of comparisons
may be open at once, and one that never ends costs its alpha and nothing else. A rejection counts from the next
comparison on that begins after it was written.

What was tried, in simulated ledgers of 200 ideas whose paired differences over 24 seeds are normal: ideas kept where
none has an effect; percent of the better ideas found where 10, 30 and 50 % are better, by so many standard deviations
of a paired difference; percent of the kept that are not better, where 10 % are, by 0.7. "shared": all comparisons of a
ledger use the same runs of the baseline. "11 looks": after 4, 5, ... 24 pairs, each at alpha / 11, which is the crudest
valid way to look. 4,000 ledgers for what is kept by mistake, 200 for most of the rest (tests/records/test_ledger.py,
test_table). The standard error of what is found is 1.3 points at most, of what is kept 0.02 alone and a tenth to half
of it shared, of what is false 0.15 and 1.3 points at most.

                                     none better    0.7 sd        1 sd         1.5 sd        2 sd       false, %
                                     alone shared   10  30  50    10  30  50    10  30  50    10  30  50  alone shared
    the ledger's rule                 0.019   0.15    37  67  72    91  97  97   100 100 100   100 100 100    2.4   6.2
    the same, 11 looks a comparison   0.013   0.03     8  24  38    68  83  86    99 100 100   100 100 100    2.0   5.6
    without the cap of 0.005          0.019   0.29    38  73  84    91  98  99   100 100 100   100 100 100    3.4  10.9
    j^-1.6, no cap                    0.025   0.33    30  72  85    89  98  99   100 100 100   100 100 100    4.2  15.0
    logarithmic gamma, no cap         0.006   0.03    21  48  62    83  94  97   100 100 100   100 100 100    0.9   3.5
    SAFFRON, j^-1.3                   0.021   3.86    42  78  89    93  99  99   100 100 100   100 100 100    3.5  43.7
    SAFFRON, j^-1.6                   0.026   5.88    39  80  91    92  99 100   100 100 100   100 100 100    4.4  52.5
    SAFFRON, j^-1.3, cap of 0.005     0.021   0.68    41  70  72    92  97  97   100 100 100   100 100 100    2.8   8.4
    0.01 two-sided for each           1.021   1.13    72  73  73    98  97  97   100 100 100   100 100 100    5.8   5.9
    Bonferroni, 0.05 / 200            0.053   0.06    31  31  32    78  77  78   100 100 100   100 100 100    0.7   0.7

LORD++ was chosen and not SAFFRON. From 1 sd on it finds as much, within 2 points. It needs no p value, which a
comparison with several looks does not have in a simple form. And where comparisons share their baseline's runs,
SAFFRON, which pays nothing for p values below lambda, keeps 13 times as much by mistake as LORD++ without the cap, 5
times with it. One set of runs then makes all ideas look better, or all worse. That breaks what the bound asks for: that
what is known when a comparison begins says nothing about the noise of its runs. In the hardest mix LORD++ itself then
has 6 % false ones instead of 5. Other seeds for each comparison restore the bound.

The file has one JSON object a line and is only appended to, under a lock: HEADER, then {"begun": ...} and {"ended":
...} as BEGUN and ENDED say. A reader computes every alpha again from the lines before it and refuses a ledger that was
edited. It cannot see an edited outcome after which nothing began, nor comparisons outside of the ledger. Half a line at
the end is of a process that was killed before it knew its alpha: it is cut off. Whoever asks again with the same plan
gets the same entry: a plan has one alpha.

Sources: LORD++: Ramdas, Yang, Wainwright and Jordan, 2017, arxiv.org/abs/1710.00499; SAFFRON: Ramdas, Zrnic, Wainwright
and Jordan, 2018, arxiv.org/abs/1802.09098; comparisons that overlap: Zrnic, Ramdas and Jordan, 2021,
arxiv.org/abs/1812.05068; logarithmic gamma: Javanmard and Montanari, 2018, arxiv.org/abs/1603.09000
"""

import argparse
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from records.clean import count
from records.fields import check_content, check_fields, check_text, parse_fields
from records.runs import fcntl, one_line, prepare_console
from train_gpt import RunError, require

ALPHA = 0.05                    # of the ledger: how much of what is kept may be false
WEALTH = ALPHA / 2              # W0: what may be spent before anything is rejected
CAP = 0.005                     # of one comparison, one-sided: half of the two-sided alpha without a ledger
EXPONENT = 1.3                  # of the sequence gamma
ZETA = 3.9319492118095446       # Riemann's zeta(EXPONENT), so that gamma sums to 1
LAMBDA = 0.5                    # SAFFRON: a p value up to this is a candidate
AGREEMENT = 1e-9                # relative: powers and sums have other last digits on another machine
KEPT = "better"                 # the word of a verdict that rejects

HEADER = {"format": "knotgpt-ledger-1", "method": "LORD++", "alpha": ALPHA}
BEGUN = {
    "id": (int, 1, 2 ** 31),        # 1, 2, 3, ...
    "when": str,                    # UTC
    "plan": str,                    # what tells this comparison from every other one
    "folder": str,                  # of the comparison
    "command": check_text,
    "arms": [check_text],           # the ideas: all arms but the baseline
    "alpha": (float, 0.0, CAP)}     # of all arms together, one-sided
ENDED = {
    "id": (int, 1, 2 ** 31),
    "when": str,
    "verdicts": {str: str},         # arm: word
    "rejected": bool}               # whether a word is KEPT
LINE = {"begun?": BEGUN, "ended?": ENDED}
BEGINNINGS = (b'{"format": ', b'{"begun": {', b'{"ended": {')  # of lines, as they are written here

ATTEMPTS = 600                  # to lock a ledger
PAUSE = 0.05                    # seconds between them; who holds the lock does so for milliseconds


@dataclass(frozen=True)
class Entry:
    """A comparison in a ledger."""

    id: int                                 # from 1 on, in the order in which comparisons began
    when: str                               # it began, UTC
    plan: str                               # what tells it from every other one
    folder: str
    command: str
    arms: list[str]                         # the ideas: all arms but the baseline
    alpha: float                            # of all arms together, one-sided
    verdicts: dict[str, str] | None = None  # arm: word; None while the comparison is open
    known: int = 0                          # how many had begun when the verdicts were written; 0 while it is open

    @property
    def rejected(self) -> bool:
        """Whether an arm is better, as far as the ledger knows: an open comparison has rejected nothing."""
        return self.verdicts is not None and KEPT in self.verdicts.values()

    @property
    def arm_alpha(self) -> float:
        """
        The alpha of each arm's two-sided test, sequential or not. Bonferroni divides the one-sided alpha among the
        arms, which bounds the expected number of false "better" whatever the other arms are; Holm's method does not.
        """
        return 2 * self.alpha / len(self.arms)


# ---- The rules

def spend(index: np.ndarray) -> np.ndarray:
    """
    Return gamma_j = j^-1.3 / zeta(1.3) for whole numbers j (any shape, float64), and 0 for j < 1. The sequence falls
    and sums to 1. The exponent is a choice: the larger it is, the more is spent soon after a rejection.
    """
    index = np.asarray(index, dtype=np.float64)
    return np.where(index < 1, 0.0, np.maximum(index, 1.0) ** -EXPONENT / ZETA)


def lord_alpha(rejected: np.ndarray, known: np.ndarray, alpha: float = ALPHA, wealth: float = WEALTH,
               gamma: Callable = spend) -> np.ndarray:
    """
    Return LORD++'s alpha_t of comparison t, shape (...), after t - 1 others, in each of (...) ledgers:

        alpha_t = W0 gamma_t + (alpha - W0) gamma_{t - r_1} + alpha sum_{j >= 2} gamma_{t - r_j}

    r_j is how many comparisons had begun when the j-th rejection became known; gamma is 0 for an index below 1. If
    none overlap, r_j is the number of the j-th comparison that rejected, as in the paper.

    rejected: bool (..., t - 1), False for an open comparison. known: int (..., t - 1), read where `rejected` is true.
    alpha: of the ledger. wealth: W0. gamma: of an array of indices. Source: Ramdas et al., 2017; with r_j in
    place of tau_j: Zrnic, Ramdas and Jordan, 2021.
    """
    t = rejected.shape[-1] + 1
    ages = np.where(rejected, t - known, 0)  # gamma_0 is 0
    oldest = ages.max(-1, initial=0)
    return wealth * (gamma(t) - gamma(oldest)) + alpha * gamma(ages).sum(-1)


def saffron_alpha(rejected: np.ndarray, known: np.ndarray, candidate: np.ndarray, alpha: float = ALPHA,
                  wealth: float = WEALTH, threshold: float = LAMBDA, gamma: Callable = spend) -> np.ndarray:
    """
    Return SAFFRON's alpha_t of comparison t, shape (...), which pays for a comparison only where p > lambda:

        alpha_t = min(lambda, (1 - lambda) (W0 gamma_{t - C_0} + (alpha - W0) gamma_{t - r_1 - C_1}
                                            + alpha sum_{j >= 2} gamma_{t - r_j - C_j}))

    C_j counts the candidates, p <= lambda, among the comparisons from r_j + 1 to t - 1, with r_0 = 0. An open one is no
    candidate, so that it is paid for.

    rejected, known, alpha, wealth, gamma: as for lord_alpha. candidate: bool (..., t - 1), True wherever `rejected` is.
    threshold: lambda. The ledger does not use it, for the reasons above; the table is computed with it. Source:
    Ramdas et al., 2018; open comparisons: Zrnic, Ramdas and Jordan, 2021.
    """
    t = rejected.shape[-1] + 1
    none = np.zeros((*candidate.shape[:-1], 1), dtype=np.int64)
    before = np.concatenate([none, np.cumsum(candidate, -1)], -1)  # (..., t): candidates among the first 0 .. t - 1
    total = before[..., -1:]

    # the indices of gamma: 0 for what has not rejected
    since = np.where(rejected, known, 0)
    ages = np.where(rejected, t - since - (total - np.take_along_axis(before, since, -1)), 0)
    oldest = ages.max(-1, initial=0)  # indices fall from each r_j to the next
    spent = wealth * (gamma(t - total[..., 0]) - gamma(oldest)) + alpha * gamma(ages).sum(-1)
    return np.minimum(threshold, (1 - threshold) * spent)


def next_alpha(entries: Sequence[Entry]) -> float:
    """The alpha, of all arms together and one-sided, of the comparison that begins after these of a ledger."""
    rejected = np.array([entry.rejected for entry in entries], dtype=bool)
    known = np.array([entry.known for entry in entries], dtype=np.int64)
    return min(CAP, float(lord_alpha(rejected, known)))


# ---- Reading

def split_lines(path: Path, content: bytes) -> list[bytes]:
    """
    The complete lines of a ledger, without their ends. What stands after the last end of a line is left out where it is
    the beginning of a line that a killed process was writing, and kept where it is a whole JSON object: an editor took
    its end away, or the process was killed just before it. RunError for anything else there.
    """
    *lines, last = content.split(b"\n")
    try:
        cut = not isinstance(json.loads(last), dict)
    except (ValueError, RecursionError):
        cut = True
    if not cut:
        lines.append(last)
    elif last:
        begins = any(last.startswith(start) or start.startswith(last) for start in BEGINNINGS)
        require(begins, f"{path}: no ledger, or damaged: it ends with {last!r:.60}; choose another file, or delete "
                "these characters")
    return lines


def parse_line(path: Path, number: int, line: bytes, shape: dict) -> dict:
    """The JSON object of a line. RunError, one line with its number, unless it has the shape."""
    remedy = f"restore line {number}, or begin another ledger"
    require(line.isascii(), f"{path}: damaged: line {number} has characters that no ledger has; {remedy}")
    return parse_fields(line.decode("ascii"), path, f"the fields of line {number}", remedy, shape)


def read_entries(path: Path, content: bytes) -> list[Entry]:
    """
    The comparisons of a ledger with this content, in order; [] for an empty one. RunError, one line, for anything that
    open_entry and close_entry would not have written.
    """
    lines = split_lines(path, content)
    if not lines:
        return []
    header = parse_line(path, 1, lines[0], {})
    require(header == HEADER, f"{path}: no ledger of this version: it begins with {json.dumps(header)[:60]!r}, not "
            f"with {json.dumps(HEADER)}; choose another file")

    # the comparisons, as far as each line knew them
    entries = []
    for number, line in enumerate(lines[1:], 2):
        fields = parse_line(path, number, line, LINE)
        where = f"{path}: line {number}"
        require(fields.keys() in ({"begun"}, {"ended"}),
                f"{where} has the fields {', '.join(fields) or 'none'!r:.60}, not begun or ended alone; restore it")
        if "begun" in fields:
            entries.append(check_begun(where, entries, fields["begun"]))
        else:
            ended = check_ended(where, entries, fields["ended"])
            entries[ended.id - 1] = ended
    return entries


def check_begun(where: str, entries: list[Entry], fields: dict) -> Entry:
    """The comparison of a line "begun". RunError unless it follows from the comparisons before it."""
    entry = Entry(**{name: fields[name] for name in BEGUN})
    require(entry.id == len(entries) + 1, f"{where} begins comparison {entry.id} after {len(entries)} others, so lines "
            "are missing or twice there; restore the ledger")
    require(entry.arms and len(set(entry.arms)) == len(entry.arms),
            f"{where} has the arms {entry.arms!r:.60}, not one or more that differ; restore it")
    require(all(entry.plan != other.plan for other in entries),
            f"{where} begins a plan that another line began; restore the ledger")
    expected = next_alpha(entries)
    require(math.isclose(entry.alpha, expected, rel_tol=AGREEMENT),
            f"{where} has alpha {entry.alpha:.6g}, the lines before it give {expected:.6g}: the ledger was edited; "
            "restore it, or begin another one")
    return entry


def check_ended(where: str, entries: list[Entry], fields: dict) -> Entry:
    """The comparison of a line "ended", now with its verdicts. RunError unless it is one that was open before it."""
    number = fields["id"]
    require(number <= len(entries) and entries[number - 1].verdicts is None,
            f"{where} ends comparison {number}, which is not open there; restore the ledger")
    entry = replace(entries[number - 1], verdicts=fields["verdicts"], known=len(entries))
    require(entry.verdicts.keys() == set(entry.arms),
            f"{where} has verdicts on {', '.join(entry.verdicts)!r:.60}, the comparison is of "
            f"{', '.join(entry.arms)!r:.60}; restore it")
    require(entry.rejected == fields["rejected"],
            f"{where} has rejected {fields['rejected']} with the verdicts {entry.verdicts!r:.60}; restore it")
    return entry


# ---- Writing

def open_entry(path: Path, plan: str, folder: Path | str, command: str, arms: list[str]) -> Entry:
    """
    Return the comparison with its alpha, which this writes down first: to be called before the first run begins. The
    same plan gets the entry that it already has, open or ended, whatever its folder.

    path: the ledger, which is made where there is none. plan: a text that is the same for the same arms, options,
    seeds, code and data, and for no others. folder, command: for people. arms: the names of all arms but the baseline,
    at least one, all different. RunError where the ledger is damaged, was edited, cannot be locked or written.
    """
    fields = dict(plan=plan, folder=str(folder), command=command, arms=list(arms))
    require(arms and len(set(arms)) == len(arms),
            f"a comparison in a ledger has one or more arms beside the baseline, all different, got {arms!r:.100}")
    with open_locked(path, exists=False) as file:
        entries = read_and_mend(path, file)

        # an earlier call began it
        for entry in entries:
            if entry.plan == plan:
                require(entry.arms == fields["arms"], f"{path}: comparison {entry.id} has this plan and the arms "
                        f"{entry.arms!r:.60}, now {arms!r:.60}; a plan belongs to its arms")
                return entry

        # it begins
        begun = dict(id=len(entries) + 1, when=now()) | fields | dict(alpha=next_alpha(entries))
        lines = [dict(begun=begun)]
        if file.tell() == 0:
            lines.insert(0, HEADER)
        append(path, file, lines)
        return Entry(**begun)


def close_entry(path: Path, id: int, verdicts: dict[str, str]) -> Entry:
    """
    Write down the verdicts of an open comparison, {arm: word}, of all its arms, and return it. "better" is a
    rejection, every other word is none, such as that of an arm whose runs failed. A second call with the same verdicts
    changes nothing. RunError for other verdicts than those that stand there, for an id that the ledger does not have,
    and as for open_entry.
    """
    with open_locked(path, exists=True) as file:
        entries = read_and_mend(path, file)
        require(1 <= id <= len(entries), f"{path}: it has {len(entries)} comparisons and no number {id}; name the "
                "ledger that began it")
        entry = entries[id - 1]
        require(verdicts.keys() == set(entry.arms), f"{path}: comparison {id} is of {', '.join(entry.arms)!r:.60}, the "
                f"verdicts are on {', '.join(verdicts)!r:.60}; give one for each arm")

        # an earlier call ended it
        if entry.verdicts is not None:
            require(entry.verdicts == verdicts, f"{path}: comparison {id} ended with {entry.verdicts!r:.100}, now "
                    f"{verdicts!r:.100}; the first verdict stands")
            return entry

        # it ends
        entry = replace(entry, verdicts=dict(verdicts), known=len(entries))
        ended = dict(id=id, when=now(), verdicts=entry.verdicts, rejected=entry.rejected)
        append(path, file, [dict(ended=ended)])
        return entry


def open_locked(path: Path, exists: bool) -> BinaryIO:
    """
    The file of a ledger, which this process alone reads and writes until it closes it; a new one unless it `exists`
    already. RunError where it cannot be opened or locked, or where others hold it for half a minute.
    """
    require(fcntl is not None, f"{path}: a ledger cannot be locked on this system; leave --ledger out")
    for _ in range(ATTEMPTS):
        try:
            require(path.is_file() or not exists and not path.exists(),
                    f"{path}: no such ledger; give the file of --ledger")
            file = open(path, "a+b", buffering=0)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"cannot open the ledger {path}: {reason}; choose another file") from None
        if lock(path, file):
            return file
        file.close()
        time.sleep(PAUSE)
    raise RunError(f"{path}: other processes hold the ledger's lock for {ATTEMPTS * PAUSE:.0f} s; stop them, or call "
                   "this again")


def lock(path: Path, file: BinaryIO) -> bool:
    """
    Whether the file is locked for this process now and is still the one of this name: an editor may have put another
    one in its place. RunError where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        file.close()
        raise RunError(f"cannot lock the ledger {path}: {error.strerror}; choose a file on another disk") from None


def read_and_mend(path: Path, file: BinaryIO) -> list[Entry]:
    """
    The comparisons of a locked ledger. Half a line at its end is cut off, a last line without its end gets one, and the
    file is at its end.
    """
    file.seek(0)
    content = file.read()
    entries = read_entries(path, content)
    sound = b"".join(line + b"\n" for line in split_lines(path, content))
    if content != sound:
        try:
            file.truncate(min(len(sound), len(content)))
            file.write(sound[len(content):])
        except OSError as error:
            raise refusal(path, error) from None
    file.seek(0, os.SEEK_END)
    return entries


def append(path: Path, file: BinaryIO, lines: list[dict]):
    """
    Write lines at the end of a locked ledger, on the disk before this returns. RunError, and the ledger as it was,
    where the disk refuses or a field is none that can be read back.
    """
    # whether a reader takes it
    try:
        for line in lines:
            check_content(line)
            check_fields(line, LINE, "")
    except RunError as error:
        raise RunError(f"{path}: no ledger holds such a line: {error}; nothing was begun or ended") from None

    # write it, all of it or nothing
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    size = file.tell()
    try:
        if file.write(text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
        if size == 0:
            sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # the next call cuts half a line off
            file.truncate(size)
        raise refusal(path, error) from None


def refusal(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write the ledger {path}: {error.strerror}; free some space, nothing was begun or ended")


def sync_folder(folder: Path):
    """Have the disk hold the name of a new file, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- For people

def describe(path: Path) -> list[str]:
    """
    Lines that say how many ideas a ledger has, which were kept, which comparisons are open, and the alpha of the next
    one. RunError where there is none, or a damaged one. It waits for no lock: it may be one comparison late.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"cannot read the ledger {path}: {reason}; name the file of --ledger") from None
    entries = read_entries(path, content)
    ended = [entry for entry in entries if entry.verdicts is not None]
    kept = [(entry, arm) for entry in ended for arm, word in entry.verdicts.items() if word == KEPT]

    # what was tried, what came of it
    ideas = sum(len(entry.arms) for entry in entries)
    lines = [f"{path}: {count(ideas, 'idea')} in {count(len(entries), 'comparison')}, {len(kept)} kept; of what is "
             f"kept, at most {100 * ALPHA:g} % is expected to be false"]
    lines += [f"kept: {one_line(arm)} (comparison {entry.id}, alpha {entry.alpha:.2g}, {entry.folder})"
              for entry, arm in kept]
    lines += [f"open: comparison {entry.id} of {one_line(', '.join(entry.arms))} (alpha {entry.alpha:.2g}, since "
              f"{entry.when}, {entry.folder})" for entry in entries if entry.verdicts is None]

    # what is left
    alpha = next_alpha(entries)
    return [*lines, f"the next comparison has alpha {alpha:.2g} for \"better\", {2 * alpha:.2g} two-sided"]


def main(argv: list[str] | None = None) -> int:
    """Print what a ledger says. Returns the exit code: 0, or 1 and one line on stderr for a fault."""
    parser = argparse.ArgumentParser(prog="python -m records.ledger", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path, help="the file of --ledger")
    options = parser.parse_args(argv)
    try:
        lines = describe(options.ledger)
    except RunError as error:
        print(f"records.ledger: error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
