"""Messages to prompt text, by a model's chat template.

Renders what transformers' `apply_chat_template` renders, within limits (`template_sandbox`). The result is encoded with
`tokenizer.encode(text, add_special_tokens=False, parse_special=True)`; `encode_chat` does both.

A template that the *client* sends is a program that the client runs here: it is bounded, but a server should refuse it
all the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.tokenization.chat_messages import TextMarker, plain_messages, plain_tools, text_only

if TYPE_CHECKING:
    import jinja2
    import jinja2.nodes

    from jaxserve.tokenization.template_sandbox import ChatTemplateEnvironment
    from jaxserve.tokenization.tokenizer import Tokenizer

_MAX_TEMPLATE_CHARS = 64 * 1024  # compiling takes 40 ms a KiB at worst; the longest in use have 20
_MAX_SECONDS = 2.0  # compiling or rendering; real templates take 1 to 30 ms
_COMPILE_WORK = 1_000_000
_BASE_WORK = 4_000_000
_WORK_PER_CHAR = 64  # of messages and tools: real templates use 2 to 10
_NO_TEMPLATE = "a Jinja template, because this model has none of its own"
_NO_TEMPLATE_REMEDY = "Pass chat_template=…, or format the prompt yourself and use generate."
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    bos_token: str | None = None,
    eos_token: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    protect: Iterable[str] = (),
    **kwargs: str | float | bool | None,
) -> str:
    """The prompt text of a conversation.

    Args:
        template: Jinja source; None is an error that says what to do.
        messages: objects with `role` and `content` (text, or a list of text parts); other fields reach the template.
        add_generation_prompt: whether the text ends with the opening of the assistant's answer.
        continue_final_message: whether the text ends within the last message, for the model to go on with it.
        bos_token: text of the model's bos; None leaves the name undefined, as transformers does.
        eos_token: likewise.
        tools: JSON schemas.
        protect: texts of the special tokens. Where a message or a tool holds one of them, the result has a guard
            character inside, which `encode(parse_special=True)` removes. Without it, a user can write special tokens.
        **kwargs: scalars that the template knows, such as enable_thinking.

    Raises:
        InvalidRequestError: names `messages`, `tools`, `chat_template` or the argument, with the template's own words
            where it refuses.
        ConfigError: jinja2 is not installed.
    """
    if not isinstance(template, str) or not template:
        raise InvalidRequestError("chat_template", template, _NO_TEMPLATE, _NO_TEMPLATE_REMEDY)
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message", True, "False where add_generation_prompt is True", "Set one of them."
        )
    marker = TextMarker(protect)
    conversation = plain_messages(messages, marker)
    _check_scalars(kwargs)
    compiled, takes_parts = _compile(template)
    if not takes_parts:
        conversation = text_only(conversation)
    final_text = _mark_final_message(conversation) if continue_final_message else None
    names = {
        "messages": conversation,
        "tools": plain_tools(tools, marker),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    names |= {name: text for name, text in (("bos_token", bos_token), ("eos_token", eos_token)) if text is not None}
    rendered = _render(compiled, names | kwargs, conversation)
    return rendered if final_text is None else _cut_at_mark(rendered, final_text)


def encode_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation, in which no message can write a special token.

    Args:
        tokenizer: gives bos, eos, the special tokens and, unless `chat_template` is given, the template.
        messages: see `render_chat`.
        chat_template: used instead of the model's own.
        **options: see `render_chat`.

    Raises:
        InvalidRequestError: see `render_chat`.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_ids
    text = render_chat(
        chat_template or tokenizer.chat_template,
        messages,
        bos_token=None if bos is None else tokenizer.token_text(bos),
        eos_token=tokenizer.token_text(eos[0]) if eos else None,
        protect=tokenizer.special_tokens,
        **options,
    )
    return tokenizer.encode(text, add_special_tokens=False, parse_special=True)


@cache
def _environment() -> "ChatTemplateEnvironment":
    from jaxserve.tokenization.template_sandbox import ChatTemplateEnvironment

    return ChatTemplateEnvironment()


@lru_cache(maxsize=32)
def _compile(source: str) -> "tuple[jinja2.Template, bool]":
    """The compiled template, and whether it reads a message's content part by part."""
    try:
        import jinja2
    except ImportError as error:  # the engine core runs where it is not installed
        raise ConfigError(
            "Chat templates need the package jinja2, which is not installed: install it with pip, or format the prompt yourself"
            " and use generate."
        ) from error

    from jaxserve.tokenization.template_budget import Budget, spending

    if len(source) > _MAX_TEMPLATE_CHARS:
        raise InvalidRequestError(
            "chat_template", f"{len(source)} characters", f"at most {_MAX_TEMPLATE_CHARS} characters", "Shorten it."
        )
    try:
        with spending(Budget(_COMPILE_WORK, _MAX_SECONDS)):
            return _environment().compile_paying(source), _takes_parts(_environment().parse(source))
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise InvalidRequestError(
            "chat_template", source, f"a Jinja template that compiles ({type(error).__name__}: {error})", "Correct it."
        ) from None


def _takes_parts(tree: "jinja2.nodes.Template") -> bool:
    """Whether there is a loop over something's `content`, directly or by a name that it was set to."""
    from jinja2 import nodes

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter) and node.node is not None:
            return is_content(node.node)
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    names = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and is_content(assign.node)
    }
    # A macro's parameter counts where it is called `content`, as it is in all templates seen.
    names |= {argument.name for macro in tree.find_all(nodes.Macro) for argument in macro.args if argument.name == "content"}
    return any(
        is_content(loop.iter) or (isinstance(loop.iter, nodes.Name) and loop.iter.name in names)
        for loop in tree.find_all(nodes.For)
    )


def _render(compiled: "jinja2.Template", names: dict[str, Any], conversation: list[dict[str, Any]]) -> str:
    import jinja2

    from jaxserve.tokenization.template_budget import Budget, TemplateLimitError, spending
    from jaxserve.tokenization.template_sandbox import TemplateRaisedError

    roles = [message["role"] for message in conversation]
    try:
        with spending(Budget(_BASE_WORK + _WORK_PER_CHAR * _num_chars(names), _MAX_SECONDS)):
            return compiled.render(names)
    except TemplateRaisedError as error:
        allowed = f"a conversation that the chat template accepts, which says: {error.message}"
        raise InvalidRequestError("messages", roles, allowed) from None
    except (TemplateLimitError, jinja2.exceptions.SecurityError, RecursionError, MemoryError) as error:
        allowed = f"a template that stays within its limits ({error})"
        raise InvalidRequestError("chat_template", "this template", allowed, "Use another chat_template.") from None
    except Exception as error:  # a template can raise whatever Python raises
        allowed = f"a conversation that the chat template can render ({type(error).__name__}: {error})"
        raise InvalidRequestError("messages", roles, allowed, "Check the fields that it reads.") from None


def _num_chars(value: Any) -> int:
    """Size of what the template is given."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _num_chars(item) + 16 for key, item in value.items())
    return sum(_num_chars(item) + 16 for item in value) if isinstance(value, list) else 0


def _check_scalars(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is not None and type(value) not in (str, int, float, bool):
            raise InvalidRequestError(
                "chat_template_kwargs", {name: value}, "scalars (text, number, boolean or None)", f"Leave out {name}."
            )


def _mark_final_message(conversation: list[dict[str, Any]]) -> str:
    """Puts a mark behind the last message's text, to find its end in the rendered text; returns the text."""
    content = conversation[-1].get("content")
    part = content[-1] if isinstance(content, list) and content else None
    text = part["text"] if part else content
    if not isinstance(text, str):
        raise InvalidRequestError("continue_final_message", True, "False where the last message has no text")
    if part:
        part["text"] = text + _CONTINUE_MARK
    else:
        conversation[-1]["content"] = text + _CONTINUE_MARK
    return text


def _cut_at_mark(rendered: str, final_text: str) -> str:
    mark = _CONTINUE_MARK.strip()
    at = rendered.rfind(mark)
    if at < 0 or final_text.strip() not in rendered:
        raise InvalidRequestError(
            "continue_final_message", True, "False: this chat template rewrites the last message", "Leave it out."
        )
    # Where the template trimmed the mark's own space, it would have trimmed the text's, too.
    return rendered[:at] if rendered.startswith(_CONTINUE_MARK, at) else rendered[:at].rstrip()
