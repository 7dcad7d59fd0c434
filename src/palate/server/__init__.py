"""The service: profiles behind HTTP, with the shapes that other stacks already speak (`palate serve`; see docs/serving.md).

Everything in this package needs the extra `serve`, so nothing of it is imported before a server is asked for. `runtime` knows
nothing of HTTP; `app` and the modules of routes know nothing of how things are computed.
"""
