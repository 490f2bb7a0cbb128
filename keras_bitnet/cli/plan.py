"""`keras-bitnet plan`."""

from keras_bitnet.cli import common

NAME = "plan"
HELP = "Find the precision of every layer of a float model within a budget; writes a plan as JSON."
SUFFIX = ".plan.json"
EXAMPLES = (
    "model.keras --data train.npz --budget '4.5 bits'",
    "model.keras --data train.npz --budget 300KiB --precisions ternary,int8,float -o plan.json",
    "model.keras --data train.npz --budget 3ms --report plan.html",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_data(parser)
    parser.add_argument(
        "--budget",
        required=True,
        metavar="SIZE",
        help="'4.5 bits' a weight, '1.2MB' of memory, or '3ms' for one example",
    )
    common.add_precisions(parser, "names of weight quantizers, and float")
    common.add_memory(parser)
    parser.add_argument(
        "--objective", choices=("output", "loss"), help="what is to change least; loss with targets"
    )
    common.add_loss(parser)
    common.add_filters(parser)
    parser.add_argument(
        "--report", metavar="PATH", help="write a page about the plan too, with its Pareto curve"
    )
    common.add_output(parser, SUFFIX)


def run(arguments):
    """Searches and writes."""
    from keras_bitnet.precision import suggest_precision

    path = common.output_path(arguments, SUFFIX, accepted=(".json",))
    page = None
    if arguments.report:
        page = common.checked_path(arguments.report, arguments.force, (".html", ".json"))
    data = common.load_data(arguments.data, arguments.samples)
    model = common.load_model(arguments.file)
    common.check_data(model, data)
    plan = suggest_precision(
        model,
        data,
        arguments.budget,
        precisions=[None if name == "float" else name for name in arguments.precisions],
        filters=arguments.filters,
        objective=arguments.objective,
        loss=arguments.loss,
        memory=arguments.memory,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        verbose=common.verbosity(arguments),
    )
    plan.save(path, overwrite=arguments.force)
    result = {**plan.search.to_dict(), "file": str(path)}
    if page:
        _write_page(model, plan, data, arguments, page)
        result["report"] = str(page)
    return result


def _write_page(model, plan, data, arguments, path):
    from keras_bitnet.report import quantization_report
    from keras_bitnet.transforms import quantize_model

    quantization_report(
        quantize_model(model, plan, verbose=0),
        data,
        model,
        plan=plan,
        loss=arguments.loss,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        verbose=0,
    ).save(path, overwrite=arguments.force)


def show(result):
    """The table was printed when it was measured."""
    print(f"File: {result['file']}")
    if "report" in result:
        print(f"Report: {result['report']}")
