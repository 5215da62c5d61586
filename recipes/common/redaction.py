"""No token, key or password reaches a file that a run writes, or what it says of an error."""

import os
import re
from functools import partial
from pathlib import Path

# Names of environment variables that hold secrets. TOKENIZERS_PARALLELISM, MAX_TOKENS, GIT_AUTHOR_NAME and PATH hold none.
NAME = re.compile(r"TOKEN(?!IZ|S\b)|SECRET|PASS(?:W|PHRASE|_|$)|CREDENTIAL|KEY(?!BOARD|MAP|WORD)|AUTH(?!OR)|COOKIE|BEARER"
                  r"|(?<![A-Z])PAT(?![A-Z])", re.I)
ENTRY = re.compile(r"(?:hub|api|access|auth|secret|private|bearer)_?(?:token|key)|passw|secret", re.I)  # names of entries of a record
_FLAG = r"(?i:token|key|secret|password|passwd|credentials?|auth|cookie|pat)"
SHAPES = re.compile(
    rf"(--(?:[\w-]*[_-])?{_FLAG}[= ])(?:'[^']*'|\"[^\"]*\"|\S+)"  # --hub_token VALUE
    rf"|([?&;](?:[\w.-]*[_.-])?(?:{_FLAG}|(?i:sig|signature))=)[^&\s#'\"]+"  # https://host/file?token=VALUE
    r"|(https?://(?=[^/\s@]+@)|://[^/\s:@]*:(?=[^/\s@]+@))[^/\s]+(?=@)"  # https://USER:PASSWORD@host, https://TOKEN@host
    r"|(\bBearer )[\w.~+/=-]{8,}"
    # as the Hub, GitHub, GitLab, npm, PyPI, OpenAI, Slack, AWS and Google shape them, and JSON web tokens
    r"|\b(?:(?:hf|gh[pousr])_[A-Za-z0-9]{20,}|(?:github_pat|npm)_\w{20,}|(?:glpat|pypi)-[\w-]{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})")
SHORTEST = 6  # a value of fewer characters (AUTH=none, KEY=1) may stand anywhere by chance


def redacted(value):
    """`value` (text, or lists and dicts of it) with every secret replaced: what looks like one, what follows a flag or stands in an entry
    or a part of an address whose name says so, and what the environment holds under such a name, unless it is the path of a file."""
    held = [(secret, f"<{name}>") for name, secret in os.environ.items()
            if NAME.search(name) and len(secret) >= SHORTEST and not Path(secret).exists()]
    return _redacted(sorted(held, key=lambda item: -len(item[0])), value)  # the longest first: one secret may be part of another


def _redacted(held: list[tuple[str, str]], value):
    inside = partial(_redacted, held)
    if isinstance(value, dict):
        return {inside(key): "<secret>" if isinstance(item, str) and item and item[0] != "<" and ENTRY.search(str(key)) else inside(item)
                for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inside(item) for item in value]
    if not isinstance(value, str):
        return value
    for secret, name in held:
        value = value.replace(secret, name)
    return SHAPES.sub(lambda found: f"{next(filter(None, found.groups()), '')}<secret>", value)
