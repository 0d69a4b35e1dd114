"""The pages that `stdit` serves on this machine: an application of starlette, run by uvicorn (extra `web`)."""
