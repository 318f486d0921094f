# docker build -f infra/deploy/docker/cpu.Dockerfile -t distillation:cpu .
FROM debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716
WORKDIR /app
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_TORCH_BACKEND=cpu
# The packages have a separate layer, so an edited source file does not reinstall them.
COPY infra/deploy/install/ infra/deploy/install/
COPY constraints.txt pyproject.toml ./
RUN infra/deploy/install/install.sh system && EXTRAS=s3 infra/deploy/install/install.sh dependencies /opt/venv
COPY . .
RUN infra/deploy/install/install.sh project /opt/venv \
    && useradd --uid 1000 --create-home user && install -d -o user /app/runs
USER 1000
ENV PATH=/opt/venv/bin:$PATH DS_ACCELERATOR=cpu RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
VOLUME /app/runs
CMD ["python", "-m", "offline_teacher.main", "--help"]
