"""The Python of one page: runs files in one namespace. A line on standard input is a file and a text, which follows the
file's output, with "ok" or the name of what was raised."""

import sys
import traceback


def main() -> None:
    namespace = sys.modules["__main__"].__dict__
    for line in sys.stdin:
        file, end = line.split()
        said = "ok"
        try:
            namespace["__file__"] = file
            with open(file, encoding="utf-8") as code:  # noqa: PTH123 - as few names of our own as can be
                exec(compile(code.read(), file, "exec"), namespace)
        except BaseException as error:
            if not (isinstance(error, SystemExit) and error.code in (None, 0)):
                traceback.print_exc()
                said = type(error).__name__
        sys.stderr.flush()
        sys.stdout.write(f"\n{end} {said}\n")
        sys.stdout.flush()


main()
