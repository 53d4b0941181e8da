"""Head-to-heads of a study: compare.py in this process, by its command line."""

import compare
from compare import Comparison
from records.processes import Interrupt, Interrupted


def run_comparison(argv: list[str]) -> tuple[Comparison, dict | None]:
    """
    Do what is missing of the comparison of compare.py's command line argv. Returns it and its results; of --dry-run,
    which prints its plan, None. RunError for what cannot be run; KeyboardInterrupt for a signal. Finished runs are kept
    in ./comparisons, where the same command finds them again.
    """
    with Interrupt() as interrupt:
        arguments, settings = compare.parse_arguments(argv)
        comparison = compare.prepare(arguments, settings, argv, interrupt)
        try:
            return comparison, compare.run_or_show(comparison, arguments)
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            lock = getattr(comparison, "lock", None)
            if lock is not None:  # a later call in this process may open the folder again
                lock.close()
