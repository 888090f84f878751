"""The cluster itself: what the other tests of this folder take for granted."""

import pytest

pytestmark = pytest.mark.slurm


def test_a_job_sees_its_nodes_and_pretend_gpus(cluster, tmp_path):
    out = tmp_path / "out.txt"
    wrap = "srun bash -c 'echo $SLURMD_NODENAME $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES'"
    job = cluster.run(
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--mem=100"),
        *("-o", str(out), "--wrap", wrap),
    )
    cluster.wait_for(job, {"COMPLETED"}, 60)
    assert sorted(out.read_text().splitlines()) == ["n1 2 0,1", "n2 2 0,1"]
