"""Kill both scripts, or the examples, with SIGKILL at random moments, resume, and compare with runs that were never interrupted.

python -m benchmarks.kill --runs 50, with --examples of the scripts in examples/, and with --hostile under other hostile
conditions too, where W&B may lose media
"""

import argparse
import random
import tempfile
from pathlib import Path

from tests import killing
from tests.conftest import clean_environment
from tests.wandb_server import serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=int, default=50, help="runs to kill, as many for each script [50]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments [0]")
    parser.add_argument(
        "--hostile",
        action="store_true",
        help="also SIGTERM, slow disks, damaged checkpoints, unwritable caches ...",
    )
    parser.add_argument("--examples", action="store_true", help="kill the scripts in examples/")
    args = parser.parse_args()
    scripts = killing.EXAMPLES if args.examples else killing.ARGUMENTS
    rng, same_files, same_curve, total = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as directory:
        for script in scripts:
            reference = Path(directory, script, "reference")
            reference.mkdir(parents=True)
            environment = clean_environment(reference)
            duration = killing.timed(script, reference, environment)
            with serving() as server:
                expected = killing.sync(reference, environment, server)
            for number in range(args.runs // len(scripts)):
                cwd = Path(directory, script, str(number))
                cwd.mkdir()
                interrupt = killing.hostile if args.hostile else killing.killed_and_resumed
                killed = interrupt(script, cwd, environment, duration, rng)
                differ = killing.differences(reference / "out", cwd / "out")
                if args.hostile:
                    total, same_files = total + 1, same_files + (not differ)
                    print(
                        f"{script} {number + 1}: {', '.join(killed)}; files {differ or 'identical'}",
                        flush=True,
                    )
                    continue
                with serving() as server:
                    curve = killing.sync(cwd, environment, server)
                total, same_files, same_curve = (
                    total + 1,
                    same_files + (not differ),
                    same_curve + (curve == expected),
                )
                print(
                    f"{script} {number + 1}: killed {', '.join(killed)} of {duration:.1f} s; files "
                    f"{'differ: ' + ', '.join(differ) if differ else 'identical'}; W&B history of {len(curve)} rows "
                    f"{'identical' if curve == expected else 'differs'}",
                    flush=True,
                )
    curves = "" if args.hostile else f", {same_curve} of {total} with an identical W&B history"
    print(f"{same_files} of {total} with identical files{curves}")
    if same_files < total or (same_curve < total and not args.hostile):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
