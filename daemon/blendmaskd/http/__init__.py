"""HTTP: `blendmaskd-http`, a front that is a client of the broker.

===============  ====================================================================================================
``rest``         the REST interface: what a request asks for, how it is answered; pure, and Ray's application has it too
``bodies``       the image in a body: bytes, a multipart form, JSON; pure
``kserve``       the Open Inference Protocol: tensors in, tensors out; pure
``openapi``      the document of all routes, and a page of it; pure
``application``  the routes, and what is done for each
``upstream``     requests to the broker: a client for each token, deadlines, a broker that is away, durable jobs
``guard``        around all routes: who may ask (Host, Origin, token), what is counted, answers to what went wrong
``tokens``       the file of tokens
``connections``  connections in bounds of number and time
``metrics``      what the front counts
``tracing``      spans by OpenTelemetry, where they are wanted
``program``      the process, or several on one socket
===============  ====================================================================================================
"""
