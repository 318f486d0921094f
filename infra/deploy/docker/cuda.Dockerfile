# docker build -f infra/deploy/docker/cuda.Dockerfile -t distillation:cuda .
# The CUDA version of torch's wheels; the devel image, because DeepSpeed looks for nvcc.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04@sha256:7d2f6a8c2071d911524f95061a0db363e24d27aa51ec831fcccf9e76eb72bc92
WORKDIR /app
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1
# The packages have a separate layer, so an edited source file does not reinstall them.
COPY infra/deploy/install/ infra/deploy/install/
COPY constraints.txt pyproject.toml ./
RUN infra/deploy/install/install.sh system && EXTRAS=s3 infra/deploy/install/install.sh dependencies /opt/venv
COPY . .
RUN infra/deploy/install/install.sh project /opt/venv \
    && userdel --remove ubuntu && useradd --uid 1000 --create-home user && install -d -o user /app/runs
USER 1000
ENV PATH=/opt/venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
VOLUME /app/runs
CMD ["python", "-m", "offline_teacher.main", "--help"]
