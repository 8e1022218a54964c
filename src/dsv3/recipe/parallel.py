"""How one model is spread over GPUs, and which layouts are legal: arithmetic on the recipe, before anything is started."""

from typing import Literal

from dsv3.errors import UserError
from dsv3.recipe.quantity import Length
from dsv3.recipe.section import Section

ScheduleName = Literal["one_f_one_b", "zero_bubble", "dual_pipe", "dual_pipe_v"]


class ParallelSection(Section):
    """`[parallel]`: the processes that `torchrun` starts, one a GPU, as pipeline x data (report, section 3.2: 16 x 128). The
    result is the same for every layout, up to the order of sums."""

    data: Length = 1
    """Ranks that share each batch, and the optimizer's state."""
    pipeline: Length = 1
    """Stages that the layers are divided into (report: 16)."""
    expert: Length = 1
    """Ranks, among those of `data`, that the routed experts are divided over (report: 64); a divisor of `data`."""
    schedule: ScheduleName = "dual_pipe_v"
    """In which order a pipeline's stages compute; without a pipeline it says nothing. The report: `dual_pipe`."""
    schedule_below: Literal["one_f_one_b"] | None = None
    """What takes its place, on the same layout, in steps with too few micro-batches for it (DualPipe and DualPipeV need two a
    rank of the pipeline), as at the start of a batch ramp; by default such a batch is refused. Ours."""

    bounded_exchange: bool = False
    """Whether the rows that ranks exchange with each other are padded to the most there could be, so that the host never waits for
    counts. More bytes and memory, but no wait in each layer: for few ranks (docs/parallel.md). Ours."""

    transport: Literal["nccl", "copy"] = "nccl"
    """What carries tokens to experts within a node: NCCL, or the GPUs' copy engines over symmetric memory, which take no
    multiprocessors away from GEMMs; `copy` needs `bounded_exchange` and GPUs. Ours."""

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.pipeline * self.data


def check_experts(parallel: ParallelSection, experts: int) -> None:
    """`ValueError` where the experts cannot be divided as asked, naming the numbers of ranks that they can."""
    if parallel.data % parallel.expert or experts % parallel.expert:
        legal = [ranks for ranks in divisors(parallel.data) if experts % ranks == 0]
        raise ValueError(
            f"parallel.expert = {parallel.expert}: expected a divisor of parallel.data = {parallel.data} and of "
            f"model.n_routed_experts = {experts}, such as {neighbours(parallel.expert, legal)}"
        )


def check_exchange(parallel: ParallelSection, device: str) -> None:
    """`ValueError` where tokens cannot be carried as asked."""
    if parallel.transport == "copy" and not parallel.bounded_exchange:
        raise ValueError(
            "parallel.transport = 'copy' takes slabs of one size: expected parallel.bounded_exchange = true, or parallel.transport = "
            "'nccl'"
        )
    if parallel.transport == "copy" and device == "cpu":
        raise ValueError(
            "parallel.transport = 'copy' is by copy engines of GPUs: expected 'nccl' with training.device = 'cpu'"
        )


def least_micro_batches(schedule: str, ranks: int) -> int:
    """The fewest micro-batches of one pipeline's batch that a schedule can serve."""
    return 2 * ranks if schedule in ("dual_pipe", "dual_pipe_v") else 1


def fitting_counts(schedule: str, ranks: int, micro_batches: int) -> list[int]:
    """The numbers of micro-batches nearest to this one that a schedule can serve; itself alone where it is one."""
    least = least_micro_batches(schedule, ranks)
    if micro_batches < least:
        return [least]
    return [micro_batches - 1, micro_batches + 1] if schedule == "dual_pipe" and micro_batches % 2 else [micro_batches]


def check_ranks(schedule: str, ranks: int) -> None:
    """`UserError` for a number of pipeline ranks that a schedule cannot have."""
    if ranks < 1:
        raise UserError(f"{schedule} on {ranks} ranks (parallel.pipeline): expected at least 1")
    if schedule == "dual_pipe" and ranks % 2:
        near = neighbours(ranks, [each for each in (ranks - 1, ranks + 1) if each > 1])
        raise UserError(f"{schedule} on {ranks} ranks (parallel.pipeline): expected an even number, such as {near}")


def check_pipeline(parallel: ParallelSection, layers: int, micro_batch_size: int | None, balance: str) -> None:
    """`ValueError` where this many layers, whole batches at once, or a way to balance cannot be had with the pipeline, if there is one."""
    if parallel.pipeline == 1:
        return
    check_ranks(parallel.schedule, parallel.pipeline)
    each = 2 if parallel.schedule == "dual_pipe_v" else 1
    if parallel.pipeline * each > layers:
        most = layers // each if parallel.schedule != "dual_pipe" else layers // 2 * 2
        raise ValueError(
            f"parallel.pipeline = {parallel.pipeline}: {parallel.schedule} makes {parallel.pipeline * each} stages, of a layer "
            f"at least, and model.num_hidden_layers = {layers}: expected at most {most}"
        )
    if micro_batch_size is None:
        raise ValueError(
            f"parallel.pipeline = {parallel.pipeline} needs training.micro_batch_size: its ranks work on several micro-batches at a "
            "time; expected the sequences of one, such as 1"
        )
    if balance == "batch":
        raise ValueError(
            "training.balance = 'batch' needs the loads of all micro-batches before the first gradient, and a pipeline does not "
            "know them: expected 'bias' or 'sequence', or parallel.pipeline = 1"
        )


def check_micro_batches(parallel: ParallelSection, batch: int, micro_batches: int) -> None:
    """`ValueError` where the schedule cannot serve a batch of so many sequences, so many micro-batches on each pipeline."""
    name, ranks = parallel.schedule, parallel.pipeline
    if ranks == 1 or (parallel.schedule_below is not None and micro_batches < least_micro_batches(name, ranks)):
        return
    fitting = fitting_counts(name, ranks, micro_batches)
    if micro_batches not in fitting:
        sizes = " or ".join(str(batch * each // micro_batches) for each in fitting)
        few = ", a smaller training.micro_batch_size, or parallel.schedule_below = 'one_f_one_b'"
        raise ValueError(
            f"schedule.batch_size = {batch} gives each of {parallel.data} pipelines {micro_batches} micro-batches, and {name} on "
            f"{ranks} ranks takes {' or '.join(map(str, fitting))}{'' if len(fitting) > 1 else ' or more'}: expected a batch of "
            f"{sizes} sequences{few if len(fitting) == 1 else ''}"
        )


def check_world(parallel: ParallelSection, ranks: int) -> None:
    """`UserError` where `torchrun` started another number of processes than the recipe is for."""
    if ranks == parallel.ranks:
        return
    found = f"parallel.pipeline x parallel.data = {parallel.pipeline} x {parallel.data} = {parallel.ranks} processes"
    start = f"start it with torchrun --nproc-per-node {parallel.ranks} -m dsv3 ..."
    if parallel.ranks == 1:
        start = "start it without torchrun"
    if ranks == 1:
        raise UserError(f"the recipe is for {found}, and this is one: {start}, or set both to 1")
    legal = [each for each in divisors(ranks) if each >= parallel.expert and each % parallel.expert == 0]
    fitting = [f"parallel.data={data} parallel.pipeline={ranks // data}" for data in reversed(legal)]
    others = f", or set {' or '.join(fitting[:3])}" if fitting else ""
    raise UserError(f"the recipe is for {found}, and torchrun started {ranks}: {start}{others}")


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [each for each in range(1, number + 1) if number % each == 0]


def neighbours(value: int, legal: list[int]) -> str:
    """The legal numbers next to one that is not, as a sentence has them."""
    below, above = [each for each in legal if each < value], [each for each in legal if each > value]
    return " or ".join(str(each) for each in (*below[-1:], *above[:1]))
