"""A client process: `python client.py ENDPOINT` reads requests as JSON, streams them all at once, and says what came.

One line {"started": n} for each n-th stream that has had its first message; at the end {"texts": [...], "codes": [...]}.
"""

import asyncio
import json
import sys

import grpc

from serve.protos.jaxserve.v1 import jaxserve_pb2 as pb
from serve.protos.jaxserve.v1 import jaxserve_pb2_grpc

num_started = 0


async def one(stub, prompt, max_tokens):
    global num_started
    text = ""
    call = stub.Generate(pb.GenerateRequest(text=prompt, sampling=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens)))
    try:
        async for message in call:
            if not text:
                num_started += 1
                sys.stdout.write(json.dumps({"started": num_started}) + "\n")
                sys.stdout.flush()
            text += message.text
    except grpc.aio.AioRpcError as error:
        return text, error.code().name
    return text, "OK"


async def main(endpoint):
    requests = json.loads(sys.stdin.readline())
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = jaxserve_pb2_grpc.GenerationServiceStub(channel)
        results = await asyncio.gather(*(one(stub, *request) for request in requests))
    sys.stdout.write(json.dumps({"texts": [text for text, _ in results], "codes": [code for _, code in results]}) + "\n")


asyncio.run(main(sys.argv[1]))
