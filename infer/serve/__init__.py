"""The server: OpenAI's API over HTTP.

`fields` reads a request, `content` its messages; `service` prepares and queues it; `worker` runs the scheduler;
`answers` writes the answer.
"""
