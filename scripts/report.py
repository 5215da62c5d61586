"""Write the report of a finished run, or of a comparison, again: in Chinese, say.

    python scripts/report.py --run runs/lora-gpt2 --language zh

The language is kept for the reports that later evaluations and comparisons write.
"""

import argparse
import json
import sys
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors
from recipes.common.errors import UserError
from recipes.common.wording import LANGUAGES


def main():
    errors.install()
    options = parse()
    from recipes.common import checkpoints, models, report, runs

    folder = Path(options.run)
    comparison = folder / "compare.json"
    if comparison.is_file():
        try:
            record = json.loads(comparison.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{comparison} is damaged ({error}): run scripts/compare.py again") from error
        record["report_language"] = options.language or record.get("report_language", "en")
        with errors.writing(folder):
            runs.write_json(comparison, record)
            checkpoints.write(folder / "report.html", report.render_comparison(record, record["report_language"]))
    else:
        record = models.read_record(folder)
        if options.language:
            record["report_language"] = options.language
        with errors.writing(folder):
            runs.write(folder, record)
    print(f"wrote {folder / 'report.html'}")


def parse(argv=None):
    """The command line of this script."""
    parser = args.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="the run folder, or the folder of a comparison (--output_dir)")
    parser.add_argument("--language", choices=LANGUAGES, help="en or zh (default: as before, en at first)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
