# docker build -f infra/docker/cpu.Dockerfile -t distillation:cpu .
FROM python:3.11-slim-bookworm
# One more index, not the only one: the pinned packages that torch needs are not all on it.
ARG TORCH_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
WORKDIR /app
COPY . .
RUN TORCH_OPTIONS="$TORCH_OPTIONS" PYTHON=/usr/local/bin/python3 infra/docker/install.sh \
    && useradd --uid 1000 --create-home user && install -d -o user /app/runs
USER 1000
ENV PATH=/opt/venv/bin:$PATH DS_ACCELERATOR=cpu RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
VOLUME /app/runs
CMD ["python", "-m", "offline_teacher.main", "--help"]
