# Not built or run by this project's tests; see docs/serving.md.
# The full image has a C compiler: the package is installed with its native code.
FROM python:3.11 AS build
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
RUN python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir '.[serve]'

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
# Not root; plans are read from /models, versions are kept in /versions.
RUN useradd --uid 10001 --no-create-home serve && mkdir /models /versions && chown serve /versions
USER serve
ENV PATH=/opt/venv/bin:$PATH
VOLUME ["/models", "/versions"]
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=2s --start-period=60s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["onnx-refit", "serve", "--host", "0.0.0.0", "--grpc-port", "8001", "--store", "/versions"]
CMD ["/models/model.plan"]
