// Chooses when a frame is written and hands it over to libhlgauss_h5md.so.

#include "fix_hlgauss_h5md.h"

#include "h5md_columns.h"
#include "h5md_units.h"
#include "library.h"

#include "atom.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "group.h"
#include "input.h"
#include "lammps.h"
#include "modify.h"
#include "pair.h"
#include "timer.h"
#include "update.h"
#include "variable.h"

#include <algorithm>
#include <ctime>
#include <map>

#include <sys/stat.h>
#include <unistd.h>

using namespace LAMMPS_NS;
using namespace FixConst;
using namespace h5md_units;

namespace {

constexpr char USAGE[] = "fix ID group hlgauss/h5md N file column ... [append|overwrite] "
                         "[precision single|double] [compress gzip L] [every v_name]";
constexpr char LIBRARY[] = "libhlgauss_h5md.so";
constexpr size_t ERROR_SIZE = 2048;
constexpr off_t LARGEST_SCRIPT = 1 << 20;    // bytes of an input script that go into the file

}    // namespace

/* ----------------------------------------------------------------------
   entry points of the HDF5 library, which only rank 0 opens
------------------------------------------------------------------------- */

struct FixHLGaussH5MD::Library {
  decltype(&hlgauss_h5md_interface) interface = nullptr;
  decltype(&hlgauss_h5md_check) check = nullptr;
  decltype(&hlgauss_h5md_open) open = nullptr;
  decltype(&hlgauss_h5md_begin_frame) begin_frame = nullptr;
  decltype(&hlgauss_h5md_write_column) write_column = nullptr;
  decltype(&hlgauss_h5md_end_frame) end_frame = nullptr;
  decltype(&hlgauss_h5md_close) close = nullptr;

  /// False with one line in `error` if the library is missing or of another build.
  bool load(std::string &error)
  {
    void *handle = HLGauss::open_beside_plugin(LIBRARY, error);
    const auto find = [&](auto &pointer, const char *symbol) {
      if (!handle) return false;
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(
          HLGauss::find_symbol(handle, symbol, error));
      return pointer != nullptr;
    };
    if (!find(interface, "hlgauss_h5md_interface")) return false;
    if (interface() != HLGAUSS_H5MD_INTERFACE) {
      error = std::string(LIBRARY) + " is of another build; reinstall lmp-hl";
      return false;
    }
    return find(check, "hlgauss_h5md_check") && find(open, "hlgauss_h5md_open") &&
           find(begin_frame, "hlgauss_h5md_begin_frame") &&
           find(write_column, "hlgauss_h5md_write_column") &&
           find(end_frame, "hlgauss_h5md_end_frame") && find(close, "hlgauss_h5md_close");
  }
};

/* ---------------------------------------------------------------------- */

FixHLGaussH5MD::FixHLGaussH5MD(LAMMPS *lmp, int narg, char **arg) :
    Fix(lmp, narg, arg), interval(0), next_step(-1), mode(HLGAUSS_H5MD_NEW), compress(0),
    file(nullptr), opened(false), last_step(INT64_MIN), timeout_step(-1)
{
  MPI_Comm_rank(world, &me);
  MPI_Comm_size(world, &nprocs);
  if (narg < 6) error->all(FLERR, "fix hlgauss/h5md: expected '{}'", USAGE);
  interval = utils::inumeric(FLERR, arg[3], false, lmp);
  if (interval <= 0)
    error->all(FLERR, "fix hlgauss/h5md: N must be a positive number of steps, got '{}'", arg[3]);
  filename = arg[4];
  for (int k = 0; k < narg; k++) command += (k ? " " : "fix ") + std::string(arg[k]);
  if (!atom->tag_enable) error->all(FLERR, "fix hlgauss/h5md: atoms need IDs (atom_modify id yes)");

  nevery = 1;
  dynamic_group_allow = 1;

  const auto is_keyword = [](const std::string &word) {
    return word == "append" || word == "overwrite" || word == "precision" || word == "compress" ||
           word == "every";
  };
  int float_type = HLGAUSS_H5MD_FLOAT32;
  int end = 5;
  while (end < narg && !is_keyword(arg[end])) end++;
  for (int k = end; k < narg; k++) {
    const std::string word = arg[k];
    const std::string next = k + 1 < narg ? arg[k + 1] : "";
    if (word == "append" || word == "overwrite") {
      if (mode != HLGAUSS_H5MD_NEW)
        error->all(FLERR, "fix hlgauss/h5md: give 'append' or 'overwrite' once, not both");
      mode = word == "append" ? HLGAUSS_H5MD_APPEND : HLGAUSS_H5MD_OVERWRITE;
    } else if (word == "precision") {
      if (next != "single" && next != "double")
        error->all(FLERR, "fix hlgauss/h5md: precision must be single or double, got '{}'", next);
      float_type = next == "double" ? HLGAUSS_H5MD_FLOAT64 : HLGAUSS_H5MD_FLOAT32;
      k++;
    } else if (word == "compress") {
      const std::string level = k + 2 < narg ? arg[k + 2] : "";
      if (next != "gzip" || level.size() != 1 || level < "1" || level > "9")
        error->all(FLERR,
                   "fix hlgauss/h5md: expected 'compress gzip L' with L from 1 to 9, got '{}'",
                   word + " " + next + " " + level);
      compress = level[0] - '0';
      k += 2;
    } else if (word == "every") {
      if (!utils::strmatch(next, "^v_."))
        error->all(FLERR, "fix hlgauss/h5md: expected 'every v_name', got 'every {}'", next);
      step_variable = next.substr(2);
      find_step_variable();
      k++;
    } else
      error->all(FLERR, "fix hlgauss/h5md: unknown keyword '{}' after the columns; expected '{}'",
                 word, USAGE);
  }
  if (end == 5) error->all(FLERR, "fix hlgauss/h5md: no columns given; expected '{}'", USAGE);
  columns = std::make_unique<H5MDColumns>(lmp, igroup, float_type, end - 5, arg + 5);

  // fail now rather than after a long setup; the file itself is opened before the first run
  char message[ERROR_SIZE] = "";
  int failed = 0;
  if (me == 0) {
    library = std::make_unique<Library>();
    std::string reason;
    if (!library->load(reason)) {
      failed = 1;
      snprintf(message, ERROR_SIZE, "%s", reason.c_str());
    } else
      failed = library->check(filename.c_str(), mode, message, ERROR_SIZE);
  }
  stop_if(failed, message);
}

FixHLGaussH5MD::~FixHLGaussH5MD()
{
  if (!file) return;
  char message[ERROR_SIZE] = "";
  if (library->close(file, message, ERROR_SIZE))
    error->warning(FLERR, "fix hlgauss/h5md: {}", message);
}

/// Ends every rank with the message that rank 0 has.
void FixHLGaussH5MD::stop_if(int failed, const char *message)
{
  MPI_Bcast(&failed, 1, MPI_INT, 0, world);
  if (!failed) return;
  char text[ERROR_SIZE] = "";
  if (me == 0) snprintf(text, ERROR_SIZE, "%s", message);
  MPI_Bcast(text, ERROR_SIZE, MPI_CHAR, 0, world);
  error->all(FLERR, "fix hlgauss/h5md: {}", text);
}

int FixHLGaussH5MD::setmask()
{
  return END_OF_STEP | POST_RUN;
}

/* ----------------------------------------------------------------------
   opening the file
------------------------------------------------------------------------- */

/// Text of the script that is being read, and its name in `path`; both empty if it is no file.
std::string FixHLGaussH5MD::input_script(std::string &path) const
{
  std::string text;
  struct stat info;
  if (!infile || fstat(fileno(infile), &info) != 0 || !S_ISREG(info.st_mode)) return text;
  char name[1024];
  platform::guesspath(infile, name, sizeof(name));
  path = name;
  text.resize(std::min(info.st_size, LARGEST_SCRIPT));
  const auto got = pread(fileno(infile), text.data(), text.size(), 0);
  text.resize(got > 0 ? got : 0);
  return text;
}

void FixHLGaussH5MD::open_file()
{
  const std::vector<hlgauss_h5md_column> list = columns->describe();
  const bigint num_atoms = group->count(igroup);
  char message[ERROR_SIZE] = "";
  int failed = 0;
  if (me == 0) {
    const Units &units = units_of(update->unit_style);
    std::map<std::string, std::string> texts;
    texts["lammps_version"] = lmp->version;
    texts["lmp_hl_version"] = HLGAUSS_VERSION;
    texts["fix"] = command;
    texts["pair_style"] = force->pair_style ? force->pair_style : "none";
    texts["num_ranks"] = std::to_string(nprocs);
    texts["timestep"] = fmt::format("{}", update->dt);
    texts["input_script"] = input_script(texts["input_script_path"]);
    char date[32] = "";
    const time_t now = time(nullptr);
    struct tm utc;
    if (gmtime_r(&now, &utc)) strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", &utc);
    texts["date"] = date;
    if (Pair *pair = find_model_pair(force)) {
      texts["torch_version"] = HLGAUSS_TORCH_VERSION;
      for (const char *name : {"model_path", "model_hash", "model_card"}) {
        int dim = 0;
        const auto *value = static_cast<const char *>(pair->extract(name, dim));
        if (value) texts[name] = value;
      }
    }
    std::vector<hlgauss_h5md_text> text_list;
    for (const auto &[name, value] : texts) text_list.push_back({name.c_str(), value.c_str()});

    hlgauss_h5md_settings settings = {};
    settings.path = filename.c_str();
    settings.mode = mode;
    settings.creator_version = HLGAUSS_VERSION;
    settings.unit_style = update->unit_style;
    settings.time_unit = units.time;
    settings.length_unit = units.length;
    for (int k = 0; k < 3; k++) settings.periodic[k] = domain->periodicity[k];
    settings.start_step = update->ntimestep;
    settings.from_restart = lmp->restart_ver >= 0;
    settings.num_atoms = num_atoms;
    settings.compress = compress;
    settings.num_columns = static_cast<int>(list.size());
    settings.columns = list.data();
    settings.num_texts = static_cast<int>(text_list.size());
    settings.texts = text_list.data();

    hlgauss_h5md_opened result = {};
    file = library->open(&settings, &result, message, ERROR_SIZE);
    failed = !file;
    if (file) {
      last_step = result.last_step;
      if (result.num_frames || result.num_cut)
        utils::logmesg(lmp,
                       "fix hlgauss/h5md: {} continues after {} frames; {} frames beyond step {} "
                       "were removed\n",
                       filename, result.num_frames, result.num_cut, update->ntimestep);
    }
  }
  stop_if(failed, message);
  MPI_Bcast(&last_step, 1, MPI_LMP_BIGINT, 0, world);
  opened = true;
}

/* ----------------------------------------------------------------------
   when a frame is written
------------------------------------------------------------------------- */

bool FixHLGaussH5MD::is_due(bigint step) const
{
  return step_variable.empty() ? step % interval == 0 : step == next_step;
}

/// Step after `now` on which the next frame is due. Evaluating a variable may invoke computes, so
/// this stands between clearstep_compute and addstep_compute.
bigint FixHLGaussH5MD::step_after(bigint now)
{
  if (step_variable.empty()) return now / interval * interval + interval;
  const double next = input->variable->compute_equal(find_step_variable());
  if (!(next > static_cast<double>(now) && next <= static_cast<double>(MAXBIGINT)))
    error->all(
        FLERR,
        "fix hlgauss/h5md: variable '{}' must give a step after the present one ({}), got {}",
        step_variable, now, next);
  return static_cast<bigint>(next);
}

int FixHLGaussH5MD::find_step_variable()
{
  const int variable = input->variable->find(step_variable.c_str());
  if (variable < 0) error->all(FLERR, "fix hlgauss/h5md: there is no variable '{}'", step_variable);
  if (!input->variable->equalstyle(variable))
    error->all(FLERR, "fix hlgauss/h5md: variable '{}' is not of style equal", step_variable);
  return variable;
}

/// Announce the steps of this run on which per-atom values are wanted, up to its first frame.
void FixHLGaussH5MD::init()
{
  columns->resolve(step_variable.empty() ? interval : 0);
  if (!opened) open_file();
  halts = modify->get_fix_by_style("^halt$");
  const bigint now = update->ntimestep;
  modify->addstep_compute_all(now);
  if (step_variable.empty())
    modify->addstep_compute_all((now + interval - 1) / interval * interval);
  else if (next_step > now)
    modify->addstep_compute_all(next_step);
  if (update->whichflag == 2) modify->addstep_compute_all(update->laststep);
  announce_halts();
}

/// The frame on which a fix halt may end the run must be complete as well.
void FixHLGaussH5MD::announce_halts()
{
  const bigint now = update->ntimestep;
  for (const Fix *halt : halts) columns->announce(now / halt->nevery * halt->nevery + halt->nevery);
}

/// First frame of a run, and every frame of a rerun. Like the N steps, the variable's steps need
/// not hold the step a file begins with; without it no displacement could be measured.
void FixHLGaussH5MD::setup(int)
{
  timeout_step = -1;
  const bigint now = update->ntimestep;
  const bool first = !step_variable.empty() && last_step == INT64_MIN;
  if ((is_due(now) || first) && now != last_step)
    write_frame(false);
  else if (!step_variable.empty() && next_step <= now) {
    modify->clearstep_compute();
    next_step = step_after(now);
    modify->addstep_compute_all(next_step);
  }
}

void FixHLGaussH5MD::min_setup(int)
{
  timeout_step = -1;
  if (update->ntimestep != last_step) write_frame(false);
}

void FixHLGaussH5MD::end_of_step()
{
  const bigint now = update->ntimestep;
  // fix halt may reset the timeout in its post_run before ours
  if (timer->is_timeout()) timeout_step = now;
  if (is_due(now) && now != last_step) write_frame(true);
  if (std::any_of(halts.begin(), halts.end(), [&](Fix *halt) { return now % halt->nevery == 0; }))
    announce_halts();
}

/// The frame that ended a run early, and the last one of a minimization, which has no end_of_step.
void FixHLGaussH5MD::post_run()
{
  const bool halted = timer->is_timeout() || timeout_step == update->ntimestep;
  if ((halted || update->whichflag == 2) && update->ntimestep != last_step) write_frame(false);
}

/* ----------------------------------------------------------------------
   one frame
   scheduled: every column was announced; otherwise values that LAMMPS
   does not have on this step are written as missing
------------------------------------------------------------------------- */

void FixHLGaussH5MD::write_frame(bool scheduled)
{
  const bigint now = update->ntimestep;
  const bool announced =
      is_due(now) || now == update->firststep || update->whichflag == 2 ||
      std::any_of(halts.begin(), halts.end(), [&](Fix *halt) { return now % halt->nevery == 0; });
  modify->clearstep_compute();
  columns->locate(scheduled, announced);
  if (is_due(now) || next_step <= now) next_step = step_after(now);
  modify->addstep_compute(next_step);

  const int64_t num_atoms = columns->select_atoms();
  char message[ERROR_SIZE] = "";
  int failed = 0;
  if (me == 0) {
    const auto &d = *domain;
    const double edges[9] = {d.xprd, 0.0, 0.0, d.xy, d.yprd, 0.0, d.xz, d.yz, d.zprd};
    const double time = update->atime + (now - update->atimestep) * update->dt;
    failed = library->begin_frame(file, now, time, num_atoms, edges, d.boxlo, message, ERROR_SIZE);
  }
  stop_if(failed, message);

  // after a failure the ranks still take part, so that none waits
  for (int k = 0; k < columns->size(); k++) {
    const void *values = columns->gather(k);
    if (me == 0 && !failed) failed = library->write_column(file, k, values, message, ERROR_SIZE);
  }
  if (me == 0 && !failed) failed = library->end_frame(file, message, ERROR_SIZE);
  stop_if(failed, message);
  last_step = now;
}

double FixHLGaussH5MD::memory_usage()
{
  return columns->memory_usage();
}
