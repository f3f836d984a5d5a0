"""The Python process of one page: runs files in one namespace, as if they were one script, on request.

Started as a script. Each line on standard input is JSON: {"file": …, "end": …}. After the file has run, a line with the
text of `end` and either "ok" or the name of what was raised follows its output.
"""

import json
import sys
import traceback


def main() -> None:
    namespace = sys.modules["__main__"].__dict__
    for line in sys.stdin:
        order = json.loads(line)
        said = "ok"
        try:
            with open(order["file"], encoding="utf-8") as file:  # noqa: PTH123 - as few imports as can be
                code = compile(file.read(), order["file"], "exec")
            namespace["__file__"] = order["file"]
            exec(code, namespace)
        except SystemExit as end:
            said = "ok" if end.code in (None, 0) else "SystemExit"
        except BaseException as error:
            traceback.print_exc()
            said = type(error).__name__
        sys.stderr.flush()
        sys.stdout.write(f"\n{order['end']} {said}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
