# docker build -f infra/docker/cuda.Dockerfile -t distillation:cuda .
# The same CUDA as torch's own wheels; devel, because DeepSpeed looks for nvcc.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
WORKDIR /app
COPY . .
RUN DEBIAN_FRONTEND=noninteractive infra/docker/install.sh \
    && userdel --remove ubuntu && useradd --uid 1000 --create-home user && install -d -o user /app/runs
USER 1000
ENV PATH=/opt/venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
VOLUME /app/runs
CMD ["python", "-m", "offline_teacher.main", "--help"]
