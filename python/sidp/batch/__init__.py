"""Offline inference over a file of requests: what `sidp run-batch` is made of.

records, reading, responses: the lines that come in and go out. spool, queue, writer: the work, who has it, and the
output file. engine, paged, decode, attention, padded, sampling, text: how a rank generates. worker: one rank. metrics: what is shown. run: all of it
together.
"""
