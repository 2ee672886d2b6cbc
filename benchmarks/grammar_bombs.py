"""A request in full stream while grammars arrive that are made to take forever: what it notices, and how soon they are refused.

`python -m benchmarks.grammar_bombs` streams one completion of the embedded model, alone and then beside bombs, one after
another, and prints the times between its tokens and how long each bomb took to be refused.
"""

import argparse
import asyncio
import statistics
import sys
import time
from itertools import count, pairwise

from jaxserve import AsyncLLM, ConstraintError, InvalidRequestError, OverloadedError, SamplingParams, StructuredOutputsParams


def _one_of(depth: int, salt: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "object", "properties": {f"a{salt}": {"type": "string"}}}
    for n in range(depth):
        other = {"type": "object", "properties": {f"p{n}": schema}, "required": [f"p{n}"]}
        schema = {"oneOf": [schema, other]}
    return schema


def bombs(salt: int) -> dict[str, StructuredOutputsParams]:
    """Returns grammars that nobody has sent before: what was refused once is remembered."""
    words = " & ".join(f"/(?s:.*)w{salt}x{n}(?s:.*)/" for n in range(20))
    states = f"(.*a.{{40}}b{salt}.*|.*c.{{60}}d.*|.*e.{{80}}f.*)"
    return {
        "a multiple of a large prime": StructuredOutputsParams(json={"type": "integer", "multipleOf": 2147483647 - salt}),
        "oneOf in oneOf": StructuredOutputsParams(json=_one_of(9, salt)),
        "intersections": StructuredOutputsParams(grammar=f"start: A\nA: {words}"),
        "exponential states": StructuredOutputsParams(regex=states),
    }


async def gaps(llm: AsyncLLM, num_tokens: int) -> list[float]:
    """Returns the seconds between a completion's tokens, by its reader's clock."""
    times = []
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    async for _ in llm.generate("def main():", sampling):
        times.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(times)]


async def throw(llm: AsyncLLM, spec: StructuredOutputsParams) -> tuple[float, str]:
    """Returns how long it took to hear of a bomb's end, and what it was."""
    started = time.perf_counter()
    try:
        async for _ in llm.generate("x", SamplingParams(max_tokens=4, structured_outputs=spec)):
            pass
    except (ConstraintError, InvalidRequestError, OverloadedError) as error:
        return time.perf_counter() - started, f"refused: {str(error)[:70]}"
    return time.perf_counter() - started, "served"


def line(name: str, values: list[float]) -> str:
    ordered = sorted(values)
    median = statistics.median(ordered)
    p99 = ordered[int(len(ordered) * 0.99)]
    return (
        f"{name:14} median {median * 1e3:6.2f} ms   p99 {p99 * 1e3:6.2f} ({p99 / median:4.2f} x)   "
        f"largest {ordered[-1] * 1e3:6.2f} ({ordered[-1] / median:4.2f} x)   of {len(ordered)}\n"
    )


async def main(num_tokens: int, rounds: int) -> None:
    async with AsyncLLM() as llm:
        await gaps(llm, 100)
        alone, beside = [], []
        for _ in range(rounds):
            alone += await gaps(llm, num_tokens)
            stream = asyncio.create_task(gaps(llm, num_tokens))
            for salt in count(1):
                if stream.done():
                    break
                for name, spec in bombs(salt).items():
                    seconds, end = await throw(llm, spec)
                    sys.stdout.write(f"{name:30} {seconds:5.2f} s  {end}\n")
                    if stream.done():
                        break
            beside += await stream
        sys.stdout.write(line("alone", alone) + line("beside bombs", beside))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    asyncio.run(main(args.tokens, args.rounds))
