"""All that needs a GPU, check by check, each in a process and a time budget of its own; see scripts/gpu_checks.sh.

    bash scripts/gpu_checks.sh                        # records to $OUT, or to runs/gpu_checks
    bash scripts/gpu_checks.sh --device cpu --quick   # small shapes: tries out the checks themselves

Ends with 0 if every check that ran holds, with 1 if one does not, and with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from gpu.check import Row, Setting, Skipped
from gpu.costs import bert_base, decoder
from gpu.exactness import prefix, restored, same_as_cpu
from gpu.precision import compiled, precision
from gpu.waiting import synchronizations, two_processes

TOTAL = 500.0  # seconds for all checks
# Each check with the seconds that it may take.
CHECKS: dict[str, tuple[Callable[[Setting], list[Row]], float]] = {
    "precision": (precision, 60),
    "restored": (restored, 45),
    "prefix": (prefix, 45),
    "same_as_cpu": (same_as_cpu, 45),
    "synchronizations": (synchronizations, 45),
    "bert_base": (bert_base, 90),
    "decoder": (decoder, 90),
    "two_processes": (two_processes, 150),
    "compiled": (compiled, 90),
}


def run_check(name: str, setting: Setting, record: str) -> None:
    """Run a check in this process, and write what it found."""
    os.setsid()  # it ends with all that it starts
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if setting.device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        rows = CHECKS[name][0](setting)
        status = "holds" if all(row.holds for row in rows) else "fails"
        found: dict[str, Any] = {"status": status, "rows": [{**asdict(row), "holds": row.holds} for row in rows]}
    except Skipped as reason:
        found = {"status": "skipped", "reason": str(reason)}
    except BaseException:
        found = {"status": "fails", "reason": traceback.format_exc()}
    Path(record).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_in_budget(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Run a check in a process of its own, and end that when its time is over."""
    record = Path(setting.output) / f"{name}.json"
    record.unlink(missing_ok=True)
    started = time.monotonic()
    process = multiprocessing.get_context("forkserver").Process(target=run_check, args=(name, setting, str(record)))
    process.start()
    process.join(seconds)
    over = process.is_alive()
    if over:
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    if over:
        found: dict[str, Any] = {"status": "fails", "reason": f"took more than {seconds:.0f} s"}
    elif not record.exists():
        found = {"status": "fails", "reason": f"its process ended with {process.exitcode}"}
    else:
        found = json.loads(record.read_text(encoding="utf-8"))
    found["seconds"] = round(time.monotonic() - started, 1)
    record.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def shown(name: str, found: dict[str, Any]) -> str:
    """Return what a check found as text."""
    lines = [f"{name}: {found['status']} ({found['seconds']} s)"]
    if "reason" in found:
        lines.append(f"    {found['reason'].strip()}")
    for row in found.get("rows", []):
        limit = "" if row["limit"] is None else f"  (at most {row['limit']:g})"
        lines.append(f"    {'' if row['holds'] else 'FAILS  '}{row['what']}: {row['value']:.4g}{limit}")
    return "\n".join(lines)


def main() -> int:
    """Run the checks, write records and a summary as they come, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/gpu_checks", help="the folder of the records")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="some of the checks")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected a GPU, got none; pass --device cpu --quick to try the checks out", file=sys.stderr)
        return 2
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(options.device, options.quick, options.output)
    machine = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "devices": torch.cuda.device_count(),
        "quick": options.quick,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "transformers.trainer"])
    first = context.Process(target=str)  # so that no check pays for the imports
    first.start()
    first.join()
    deadline = time.monotonic() + TOTAL
    checks: dict[str, Any] = {}
    summary = [", ".join(f"{key} {value}" for key, value in machine.items())]
    print(summary[0], flush=True)
    for name in options.only:
        checks[name] = run_in_budget(name, setting, max(1.0, min(CHECKS[name][1], deadline - time.monotonic())))
        summary.append(shown(name, checks[name]))
        print(summary[-1], flush=True)
        (folder / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
        record = json.dumps({"machine": machine, "checks": checks}, indent=2, ensure_ascii=False)
        (folder / "checks.json").write_text(record + "\n", encoding="utf-8")
    return int(any(found["status"] == "fails" for found in checks.values()))


if __name__ == "__main__":
    sys.exit(main())
