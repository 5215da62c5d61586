"""Talk to a finished run in the terminal, or ask it one thing:

    python scripts/chat.py --run runs/lora-gpt2
    python scripts/chat.py --run runs/lora-gpt2 --system "" --message "Where is my parcel?"

Commands: /reset starts over, /save FILE appends the conversation as a row to train on, /quit leaves. Reads standard input line by
line when it is piped.
"""

import argparse
import io
import json
import sys
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors
from recipes.common.errors import UserError
from recipes.common.wording import counted


class Conversation:
    """A dialogue with a model: its turns so far and how the next reply is made."""

    def __init__(self, model, tokenizer, system: str | None, max_new_tokens: int, temperature: float):
        self.model, self.tokenizer = model, tokenizer
        self.system, self.max_new_tokens, self.temperature = system, max_new_tokens, temperature
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def reply(self, text: str, out=sys.stdout) -> str:
        """Answer `text`, writing the reply to `out` as it comes. A conversation longer than the window loses its oldest turns."""
        from transformers import TextStreamer

        from recipes.common import chat, generation

        asked = [*self.messages, {"role": "user", "content": text}]
        limit = generation.limit(self.model, 10**9, self.max_new_tokens)
        whole, prompt = (chat.prompt(asked, self.tokenizer, tokens) for tokens in (10**9, limit))
        if prompt is None:
            raise UserError("this message alone is longer than the model's window: shorten it")
        if len(prompt) < len(whole):
            print(f"(the oldest turns no longer fit: the model reads {len(prompt)} of {len(whole)} tokens)", file=sys.stderr)

        class Streamer(TextStreamer):
            begun, last = False, ""

            def on_finalized_text(self, text, stream_end=False):
                text = text if self.begun else text.lstrip()  # the blank between "Assistant:" and the reply
                self.begun = self.begun or bool(text)
                if stream_end:
                    self.last = text  # written once it is known whether the reply was cut, which may leave part of a character
                else:
                    print(text, end="", file=out, flush=True)

        ids, mask = generation.left_pad([prompt], self.tokenizer.pad_token_id)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": 0.9} if self.temperature > 0 else {"do_sample": False}
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        tokens = self.model.generate(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                                     max_new_tokens=self.max_new_tokens, **sampling, streamer=streamer)[0, len(prompt):]
        answer, cut = generation.text(tokens.tolist(), self.model, self.tokenizer)
        print(streamer.last.removesuffix(generation.PART_OF_A_CHARACTER) if cut else streamer.last, file=out, flush=True)
        # Only now: an interrupted reply leaves the conversation as it was. A reply without text stays out, as no row may hold one.
        self.messages = [*asked, {"role": "assistant", "content": answer}] if answer else self.messages
        if cut:
            print(f"(cut at {self.max_new_tokens} tokens: --max_new_tokens allows more)", file=sys.stderr)
        if not answer:
            print("(the model said nothing; this exchange is left out of the conversation)", file=sys.stderr)
        return answer

    def save(self, file: str) -> str:
        """Append the conversation to `file` as a row of the chat task; returns what to tell the user."""
        if not any(m["role"] == "assistant" for m in self.messages):
            return "nothing to save yet"
        try:
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"{file} can't be written: {error.strerror}"
        return f"saved {counted(len(self.messages), 'turns')} to {file}"


def main():
    errors.install()
    options = parse()
    if options.seed is not None:
        from transformers import set_seed

        set_seed(options.seed)
    from recipes.common import models

    if options.message is not None and not options.message.strip():
        raise UserError("--message is empty: say something, or leave it out for a conversation")
    for flag in ("message", "system"):
        if _broken(getattr(options, flag) or ""):
            raise UserError(f"--{flag}: not UTF-8; set the terminal's encoding to UTF-8")
    record = models.read_record(Path(options.run))
    if record["task"] != "chat":
        raise UserError(f"--run {options.run} was trained for --task {record['task']}, not to chat: score it with scripts/evaluate.py")
    model, tokenizer = models.load_run(options.run, merge=True), models.load_run_tokenizer(options.run)
    system = options.system if options.system is not None else record["data"]["system"]
    conversation = Conversation(model, tokenizer, system, options.max_new_tokens, options.temperature)
    if options.message is not None:
        conversation.reply(options.message)
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{record['recipe']} on {record['model']['used']}. /reset, /save FILE, /quit")
        if system:
            print(f"system turn{'' if options.system else ', the most frequent in its data'} (--system changes it): {system}")
    while True:
        try:
            line = input("you> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        try:
            if not step(conversation, line):
                break
        except KeyboardInterrupt:
            print("\n(interrupted)")
        except UserError as error:
            print(f"({error})", file=sys.stderr)


def _broken(text: str) -> bool:
    """Whether `text` holds half characters, as bytes that are not UTF-8 become on a command line."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def step(conversation: Conversation, line: str) -> bool:
    """Obey one line: a command, or something to answer. False ends the conversation."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
        print("(a new conversation)")
    elif command == "/save":
        print(f"({conversation.save(rest.strip()) if rest.strip() else 'name a file: /save FILE'})")
    elif command.startswith("/"):
        print(f"(unknown command {command}: /reset, /save FILE, /quit)")
    elif line:
        conversation.reply(line)
    return True


def parse(argv=None):
    """The command line of this script."""
    parser = args.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="the run folder (--output_dir of the training)")
    parser.add_argument("--message", help="answer this and exit")
    parser.add_argument("--system", help="the system turn; '' for none (default: the most frequent one of the run's data)")
    parser.add_argument("--max_new_tokens", type=args.positive, default=256, help="longest reply (default: 256)")
    parser.add_argument("--temperature", type=args.not_negative, default=0.0,
                        help="above 0: sample, with top_p 0.9 (default: 0, the likeliest token)")
    parser.add_argument("--seed", type=int, help="make sampling repeatable")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
