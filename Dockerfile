# mas on an NVIDIA GPU, with the versions of requirements.lock. Not built by the project's own tests.
#   docker build -t mas . && docker run --gpus all -p 8888:8888 mas
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /mas
COPY requirements.lock ./
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir -r requirements.lock
COPY . .
RUN /venv/bin/pip install --no-cache-dir --no-deps -e .
ENV PATH=/venv/bin:$PATH
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--allow-root", "notebooks"]
