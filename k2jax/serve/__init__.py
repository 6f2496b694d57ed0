"""HTTP over the engine: what OpenAI's and Kimi's clients speak, and a page to chat.

`app.make_app(service)` is the Starlette application, `lifecycle.run` serves it until a signal.
A request's body is read by `chat_request` or `completion_request` into an `Ask`; `running` has its
sequences in the engine; `chat_answer` and `completion_answer` turn what the engine says into
chunks. An answer that is not streamed is its chunks joined, so both say the same.
"""
