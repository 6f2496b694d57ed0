"""How DeepSeek-V3 and its successors write tool calls.

`<calls begin><call begin>function<sep>NAME` and a fenced block of JSON in V3 and R1,
`<call begin>NAME<sep>JSON` from V3.1 on. Source: the tool-call parsers of vLLM and SGLang for both,
and the published templates, which write a conversation's earlier calls so.
"""

import re


def token(words: str) -> str:
    """The name of a control token: words joined by U+2581 between full-width bars."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


CALLS, END_CALLS = token("tool calls begin"), token("tool calls end")
CALL, END_CALL = token("tool call begin"), token("tool call end")
SEPARATOR = token("tool sep")
KIND = "function"  # stands before the separator in V3
FENCE, END_FENCE = "```json\n", "```"
CLOSING = re.compile(r"\s*`{0,3}\s*\Z")


class Written:
    """Reads what follows the separator, in any portions.

    Attributes:
        name: of the function; "" until it is known.
    """

    def __init__(self, head: str):
        """`head` is what stood before the separator."""
        self.name = "" if head.strip() == KIND else head.strip()
        self._held = ""
        self._begun = self._fenced = False

    def feed(self, text: str) -> str:
        """The arguments in it; what may be the end of the block is held back."""
        self._held += text
        if not self.name and not self._named():
            return ""
        if not self._begun and not self._opened():
            return ""
        end = len(self._held)
        if self._fenced and (closing := CLOSING.search(self._held)):
            end = closing.start()
        arguments, self._held = self._held[:end], self._held[end:]
        return arguments

    def close(self) -> str:
        """Arguments that were held back, when the call has ended."""
        left, self._held = self._held, ""
        return "" if self._fenced and left.strip() in ("", END_FENCE) else left

    def _named(self) -> bool:
        """Whether the name is there: a line of its own; from V3.1 on it came before."""
        begun = self._held.lstrip()
        if begun.startswith("{"):
            self.name = KIND
            return True
        name, line, rest = begun.partition("\n")
        if line:
            self.name, self._held = name.strip(), rest
        return bool(line)

    def _opened(self) -> bool:
        """Whether the arguments have begun, behind a fence or without one."""
        begun = self._held.lstrip()
        if len(begun) < len(FENCE) and FENCE.startswith(begun):
            return False
        self._begun, self._fenced = True, begun.startswith(FENCE)
        self._held = begun.removeprefix(FENCE)
        return True
