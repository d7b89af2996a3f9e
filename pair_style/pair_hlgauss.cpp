#include "pair_hlgauss.h"

#include "library.h"
#include "sha256.h"

#include "atom.h"
#include "comm.h"
#include "compute.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "modify.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "platform.h"
#include "update.h"
#include "utils.h"

#include <algorithm>
#include <cctype>
#include <climits>
#include <cmath>
#include <cstring>
#include <new>

using namespace LAMMPS_NS;

namespace {

constexpr double MASS_TOLERANCE = 0.01;    // relative difference that is worth a warning

template <typename Range> std::string join(const Range &words)
{
  std::string text;
  for (const auto &word : words) {
    if (!text.empty()) text += ' ';
    text += word;
  }
  return text;
}

bool is_device(const std::string &word)
{
  if (word == "auto" || word == "cpu" || word == "cuda") return true;
  const std::string index = word.rfind("cuda:", 0) == 0 ? word.substr(5) : "";
  return !index.empty() && index.size() < 4 &&
         std::all_of(index.begin(), index.end(), [](unsigned char c) { return std::isdigit(c); });
}

void broadcast(std::string &bytes, MPI_Comm world)
{
  int me;
  MPI_Comm_rank(world, &me);
  bigint size = (bigint) bytes.size();
  MPI_Bcast(&size, 1, MPI_LMP_BIGINT, 0, world);
  if (me != 0) bytes.resize(size);
  for (bigint done = 0; done < size; done += INT_MAX)    // MPI counts are ints
    MPI_Bcast(bytes.data() + done, (int) std::min<bigint>(INT_MAX, size - done), MPI_BYTE, 0,
              world);
}

}    // namespace

/* ---------------------------------------------------------------------- */

PairHLGauss::PairHLGauss(LAMMPS *lmp) :
    Pair(lmp), nodes(lmp), memory_limit(0.0), exchange_features(true), edges_on_device(false),
    model_size(0), log_pending(false), energy_unit(1.0), fields_step(-1), num_evaluations(0),
    num_with_fields(0), num_edges_seen(0), num_centers_seen(0), time_graph(0.0), time_model(0.0),
    time_tally(0.0), peak_bytes(0.0)
{
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  no_virial_fdotr_compute = 1;    // the virial is summed over edges
  centroidstressflag = CENTROID_NOTAVAIL;
}

PairHLGauss::~PairHLGauss()
{
  if (copymode || !allocated) return;
  memory->destroy(setflag);
  memory->destroy(cutsq);
  memory->destroy(cutghost);
}

void PairHLGauss::allocate()
{
  allocated = 1;
  const int n = atom->ntypes + 1;
  memory->create(setflag, n, n, "pair:setflag");
  memory->create(cutsq, n, n, "pair:cutsq");
  memory->create(cutghost, n, n, "pair:cutghost");
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) {
      setflag[i][j] = 0;
      cutsq[i][j] = cutghost[i][j] = 0.0;
    }
}

std::vector<PairHLGauss *> PairHLGauss::find_all(LAMMPS *lmp)
{
  std::vector<PairHLGauss *> found;
  for (const char *name : {"mliap", "hlgauss"}) {
    for (int n = 1;; n++) {
      Pair *pair = lmp->force->pair_match(name, 1, n);
      if (!pair) break;
      int dim = 0;
      auto *ours = static_cast<PairHLGauss *>(pair->extract("hlgauss_pair", dim));
      if (ours && std::find(found.begin(), found.end(), ours) != found.end()) break;
      if (ours) found.push_back(ours);
      if (n > 1 && pair == lmp->force->pair_match(name, 1, n - 1)) break;
    }
  }
  return found;
}

/* ----------------------------------------------------------------------
   pair_style: read the model, load it on every rank
------------------------------------------------------------------------- */

void PairHLGauss::settings(int narg, char **arg)
{
  const std::string usage = fmt::format(
      "expected 'model FILE [device auto|cpu|cuda|cuda:N] [memory MIB] [comm exchange|extended] "
      "[edges host|device]', got '{}'; to change between LAMMPS's own mliap and this one, first "
      "give 'pair_style none'",
      join(std::vector<std::string>(arg, arg + narg)));
  if (narg < 2 || narg % 2 == 1 || strcmp(arg[0], "model") != 0)
    error->all(FLERR, "pair_style mliap/hlgauss: {}", usage);
  model_path = arg[1];
  device = "auto";
  memory_limit = 0.0;
  exchange_features = true;
  std::string edges;
  for (int k = 2; k < narg; k += 2) {
    const std::string key = arg[k], value = arg[k + 1];
    if (key == "device" && is_device(value))
      device = value;
    else if (key == "memory")
      memory_limit = utils::numeric(FLERR, value, false, lmp);
    else if (key == "comm" && (value == "exchange" || value == "extended"))
      exchange_features = value == "exchange";
    else if (key == "edges" && (value == "host" || value == "device"))
      edges = value;
    else
      error->all(FLERR, "pair_style mliap/hlgauss: cannot use '{} {}': {}", key, value, usage);
  }
  if (memory_limit < 0.0)
    error->all(FLERR, "pair_style mliap/hlgauss: memory must be positive (MiB), got {:g}",
               memory_limit);
  load_model(read_model_file());
  edges_on_device = edges.empty() ? model->info().device.rfind("cuda", 0) == 0 : edges == "device";
  // hybrid reads these right after the settings of its styles
  const bool between_layers = model->info().num_layers > 1 && exchange_features;
  comm_forward = between_layers ? FeatureExchange::SLICE : 0;
  comm_reverse = between_layers || model->info().num_sums > 0 ? FeatureExchange::SLICE : 0;
}

std::string PairHLGauss::read_model_file()
{
  std::string bytes, problem;
  if (comm->me == 0) {
    const std::string found = utils::get_potential_file_path(model_path);
    FILE *file = found.empty() ? nullptr : fopen(found.c_str(), "rb");
    if (!file) {
      problem = fmt::format("cannot open model file {}: {}; give its path relative to {} or set "
                            "LAMMPS_POTENTIALS",
                            model_path, strerror(ENOENT), platform::current_directory());
    } else {
      try {
        std::vector<char> buffer(1 << 20);
        size_t n;
        while ((n = fread(buffer.data(), 1, buffer.size(), file)) > 0)
          bytes.append(buffer.data(), n);
      } catch (const std::bad_alloc &) {
        problem = fmt::format("not enough memory to read model file {}", model_path);
      }
      if (ferror(file)) problem = fmt::format("cannot read model file {}", model_path);
      fclose(file);
    }
  }
  broadcast(problem, world);
  if (!problem.empty()) error->all(FLERR, "pair_style mliap/hlgauss: {}", problem);
  broadcast(bytes, world);
  return bytes;
}

void PairHLGauss::load_model(const std::string &bytes)
{
  MPI_Comm node;
  int local_rank, local_ranks;
  MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  MPI_Comm_rank(node, &local_rank);
  MPI_Comm_size(node, &local_ranks);
  MPI_Comm_free(&node);

  std::string problem;
  void *library = HLGauss::open_beside_plugin(HLGauss::TORCH_LIBRARY, problem);
  if (!library)
    problem += fmt::format(" (built against torch {})", HLGAUSS_TORCH_VERSION);
  else if (auto load = reinterpret_cast<HLGauss::LoadModel>(
               HLGauss::find_symbol(library, HLGauss::LOAD_MODEL_SYMBOL, problem))) {
    const HLGauss::LoadRequest request = {bytes.data(), bytes.size(),   device.c_str(), local_rank,
                                          local_ranks,  comm->nthreads, memory_limit};
    model.reset(load(request, problem));
    if (!model) problem = model_path + ": " + problem;
  }
  check_same_everywhere(problem);

  const auto &info = model->info();
  model_size = bytes.size();
  model_hash = HLGauss::sha256(bytes.data(), bytes.size());
  field_names = join(info.fields);
  field_flags.assign(info.fields.size(), 0);
  field_values.assign(info.fields.size(), {});
  fields_step = -1;
  ghostneigh = info.num_layers > 1 && !exchange_features ? 1 : 0;
  // a neighbour's energy reaches an atom in one step only where no messages pass
  centroidstressflag = info.num_layers > 1 ? CENTROID_NOTAVAIL : CENTROID_AVAIL;
  type_to_element.clear();
  if (!info.warning.empty() && local_rank == 0) error->warning(FLERR, "hlgauss: {}", info.warning);
  const std::string built = HLGAUSS_LAMMPS_VERSION;    // a date as number or as LAMMPS prints it
  if (comm->me == 0 && built != std::to_string(lmp->num_ver) && built != lmp->version)
    error->warning(FLERR,
                   "hlgauss: the plugin was built against LAMMPS {} and runs in {}: reinstall "
                   "lmp-hl",
                   HLGAUSS_LAMMPS_VERSION, lmp->version);
}

/// Ends the run on all ranks alike with the first rank's problem, if any rank has one.
void PairHLGauss::check_same_everywhere(const std::string &problem)
{
  int first = problem.empty() ? comm->nprocs : comm->me;
  MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT, MPI_MIN, world);
  if (first == comm->nprocs) return;
  int size = (int) problem.size();
  MPI_Bcast(&size, 1, MPI_INT, first, world);
  std::string message = problem;
  message.resize(size);
  MPI_Bcast(message.data(), size, MPI_CHAR, first, world);
  error->all(FLERR, "pair_style mliap/hlgauss: {}{}", message,
             first == 0 ? "" : fmt::format(" (on rank {})", first));
}

/* ----------------------------------------------------------------------
   pair_coeff * * Si O NULL ...: the element of every atom type
------------------------------------------------------------------------- */

void PairHLGauss::coeff(int narg, char **arg)
{
  const auto &known = model->info().elements;
  if (narg != 2 + atom->ntypes || strcmp(arg[0], "*") != 0 || strcmp(arg[1], "*") != 0)
    error->all(FLERR,
               "pair_coeff: expected '* *' and one element or NULL for each of the {} atom "
               "types, got '{}'; {} knows {}",
               atom->ntypes, join(std::vector<std::string>(arg, arg + narg)), model_path,
               join(known));
  if (!allocated) allocate();

  type_to_element.assign(atom->ntypes + 1, -1);
  bool any = false;
  for (int itype = 1; itype <= atom->ntypes; itype++) {
    const std::string name = arg[1 + itype];
    if (name == "NULL") continue;
    const auto found = std::find(known.begin(), known.end(), name);
    if (found == known.end())
      error->all(FLERR, "pair_coeff: element {} (type {}) is not in {}; it knows {}", name, itype,
                 model_path, join(known));
    type_to_element[itype] = (int) (found - known.begin());
    any = true;
  }
  if (!any)
    error->all(FLERR, "pair_coeff: every type is NULL; {} knows {}", model_path, join(known));

  // alone, this style has to answer for NULL types as well: they feel no forces;
  // under hybrid setflag tells which pairs of types are ours
  const bool alone = force->pair == this;
  for (int i = 1; i <= atom->ntypes; i++)
    for (int j = i; j <= atom->ntypes; j++)
      setflag[i][j] = alone || (type_to_element[i] >= 0 && type_to_element[j] >= 0);
  log_pending = true;
}

/* ----------------------------------------------------------------------
   before each run
------------------------------------------------------------------------- */

void PairHLGauss::init_style()
{
  if (!force->newton_pair)
    error->all(FLERR,
               "pair_style mliap/hlgauss: wanted 'newton on', got newton off for pairs; remove "
               "the newton command");
  if (strcmp(update->unit_style, "metal") == 0)
    energy_unit = 1.0;
  else if (strcmp(update->unit_style, "real") == 0)
    energy_unit = utils::get_conversion_factor(utils::ENERGY, utils::METAL2REAL);
  else
    error->all(FLERR,
               "pair_style mliap/hlgauss: wanted 'units metal' or 'units real', got 'units {}'",
               update->unit_style);
  check_special_bonds();
  check_heat_flux();
  check_masses();

  int request = NeighConst::REQ_FULL;
  if (ghostneigh) {
    request |= NeighConst::REQ_GHOST;    // ghosts near the border need their neighbours too
    extend_ghosts();
  }
  neighbor->add_request(this, request);
  if (log_pending) log_summary();
  log_pending = false;

  num_evaluations = num_with_fields = num_edges_seen = num_centers_seen = 0;
  time_graph = time_model = time_tally = peak_bytes = exchange.seconds = 0.0;
}

/// stress/atom shares an edge among its ends, which is not how energy flows.
void PairHLGauss::check_heat_flux()
{
  if (modify->get_compute_by_style("heat/flux").empty()) return;
  if (model->info().num_layers > 1)
    error->all(
        FLERR,
        "compute heat/flux: {} passes messages, for which no heat flux is implemented; use a "
        "strictly local model",
        model_path);
  if (modify->get_compute_by_style("centroid/stress/atom").empty())
    error->all(FLERR,
               "compute heat/flux: wanted 'compute centroid/stress/atom', got stress/atom, whose "
               "heat flux is wrong for many-body potentials");
}

/// Bonded neighbours must be in the list: a many-body potential sees all atoms within its cutoff.
void PairHLGauss::check_special_bonds()
{
  if (atom->molecular == Atom::ATOMIC || atom->nbonds == 0 || force->kspace) return;
  for (int k = 1; k <= 3; k++)
    if (force->special_lj[k] == 0.0 && force->special_coul[k] == 0.0)
      error->all(FLERR,
                 "pair_style mliap/hlgauss: wanted every bonded neighbour in the list, got "
                 "special_bonds weights of 0, which drop them; add 'special_bonds lj/coul 1 1 1'");
}

/// The element whose mass is nearest must be the one named in pair_coeff.
void PairHLGauss::check_masses()
{
  const auto &info = model->info();
  if (!atom->mass) return;
  for (int itype = 1; itype <= atom->ntypes; itype++) {
    const int element = type_to_element[itype];
    if (element < 0 || !atom->mass_setflag[itype]) continue;
    const double mass = atom->mass[itype];
    const double difference = fabs(mass - info.masses[element]);
    for (size_t other = 0; other < info.elements.size(); other++)
      if (fabs(mass - info.masses[other]) < difference)
        error->all(FLERR,
                   "pair_coeff: type {} is named {} (mass {:.4g}), but its mass {:.4g} is nearer "
                   "to {} ({:.4g}); correct the order in pair_coeff or the mass",
                   itype, info.elements[element], info.masses[element], mass, info.elements[other],
                   info.masses[other]);
    if (difference > MASS_TOLERANCE * info.masses[element] && log_pending && comm->me == 0)
      error->warning(FLERR,
                     "hlgauss: type {} is {} with mass {:.6g}, the model was made for {:.6g}",
                     itype, info.elements[element], mass, info.masses[element]);
  }
}

/// Message passing needs the neighbours of neighbours: num_layers cutoffs beyond the border.
void PairHLGauss::extend_ghosts()
{
  if (comm->mode != Comm::SINGLE)
    error->all(FLERR,
               "pair_style mliap/hlgauss: {} passes messages, which needs 'comm_modify mode "
               "single'",
               model_path);
  const auto &info = model->info();
  comm->cutghostuser = std::max(comm->cutghostuser, info.num_layers * info.cutoff + neighbor->skin);
}

double PairHLGauss::init_one(int i, int j)
{
  if (setflag[i][j] == 0) error->all(FLERR, "All pair coeffs are not set");
  const bool ours = type_to_element[i] >= 0 && type_to_element[j] >= 0;
  const double cutoff = ours ? model->info().cutoff : 0.0;
  cutghost[i][j] = cutghost[j][i] = cutoff;
  return cutoff;
}

void PairHLGauss::log_summary()
{
  if (comm->me != 0) return;
  const auto &info = model->info();
  std::string text = fmt::format("hlgauss: model     {} ({} bytes)\n", model_path, model_size);
  text += fmt::format("  sha256    {}\n", model_hash);
  if (info.num_members > 1)
    text += fmt::format("  ensemble  {} potentials: energies and forces are their mean\n",
                        info.num_members);
  text += fmt::format("  runtime   {}, device {}, {}, {} thread(s) per rank\n", info.runtime,
                      info.device, info.dtype, comm->nthreads);
  text +=
      fmt::format("  cutoff    {:g} Angstrom, {} layer(s){}, ghost shell {:g} Angstrom\n",
                  info.cutoff, info.num_layers,
                  info.num_layers == 1 ? ""
                  : exchange_features  ? fmt::format(", {} features exchanged", info.num_features)
                                       : ", extended ghosts",
                  std::max(comm->cutghostuser, info.cutoff + neighbor->skin));
  text += "  fields   ";
  for (size_t k = 0; k < info.fields.size(); k++)
    text += fmt::format(" {} [{}]", info.fields[k], info.field_units[k]);
  text += info.fields.empty() ? " none\n" : "\n";
  text += "  type  element        mass  model mass\n";
  for (int itype = 1; itype <= atom->ntypes; itype++) {
    const int element = type_to_element[itype];
    const std::string mass = atom->mass && atom->mass_setflag[itype]
                                 ? fmt::format("{:.4f}", atom->mass[itype])
                                 : "per atom";
    if (element < 0)
      text +=
          fmt::format("  {:>4}  {:<7}  {:>10}  (not seen by this style)\n", itype, "NULL", mass);
    else
      text += fmt::format("  {:>4}  {:<7}  {:>10}  {:>10.4f}\n", itype, info.elements[element],
                          mass, info.masses[element]);
  }
  utils::logmesg(lmp, text);
}

/* ----------------------------------------------------------------------
   add energies, forces and virials of the nodes to those of LAMMPS
------------------------------------------------------------------------- */

void PairHLGauss::tally()
{
  const size_t num_nodes = nodes.atoms.size();
  for (size_t node = 0; node < num_nodes; node++) {
    const int i = nodes.atoms[node];
    for (int a = 0; a < 3; a++) atom->f[i][a] += energy_unit * result.forces[3 * node + a];
    if (vflag_atom)
      for (int a = 0; a < 6; a++) vatom[i][a] += energy_unit * result.atom_virials[6 * node + a];
    if (cvflag_atom)
      for (int a = 0; a < 9; a++)
        cvatom[i][a] += energy_unit * result.centroid_virials[9 * node + a];
  }
  for (size_t node = 0; node < result.energy.size(); node++) {
    if (eflag_atom) eatom[nodes.atoms[node]] += energy_unit * result.energy[node];
    if (eflag_global) eng_vdwl += energy_unit * result.energy[node];
  }
  if (vflag_global)
    for (int a = 0; a < 6; a++) virial[a] += energy_unit * result.virial[a];
}

/// A number that is none would spread over all atoms: the run ends while it can still be told
/// where it came from.
void PairHLGauss::check_finite(size_t num_owned)
{
  std::vector<int> bad;    // local atoms
  std::string what;
  const auto look = [&](const char *name, const std::vector<double> &values, size_t width) {
    for (size_t k = 0; k < values.size(); k++)
      if (!std::isfinite(values[k])) {
        if (what.empty()) what = name;
        bad.push_back(nodes.atoms[k / width]);
      }
  };
  look("energy", result.energy, 1);
  if (bad.empty()) look("force", result.forces, 3);
  if (bad.empty() && vflag_global)
    for (const double v : result.virial)
      if (!std::isfinite(v)) what = "virial";
  if (what.empty()) return;

  std::string atoms;
  bad.erase(std::unique(bad.begin(), bad.end()), bad.end());
  for (size_t k = 0; k < std::min<size_t>(bad.size(), 5); k++)
    atoms += (k ? ", " : "") + nodes.name_of(bad[k]);
  error->one(
      FLERR,
      "pair_style mliap/hlgauss: the {} of {} is not a finite number on step {}, rank {}; {}: "
      "check the time step and the starting structure",
      what,
      bad.empty()
          ? fmt::format("{} atoms", num_owned)
          : fmt::format("{}{} ({} in all)", atoms, bad.size() > 5 ? ", ..." : "", bad.size()),
      update->ntimestep, comm->me, nodes.closest_pair());
}

/// On steps where fix pair has set a trigger, or compute hlgauss/atom may be read.
bool PairHLGauss::fields_wanted() const
{
  if (std::find(field_flags.begin(), field_flags.end(), 1) != field_flags.end()) return true;
  return eflag_atom && !modify->get_compute_by_style("hlgauss/atom").empty();
}

void PairHLGauss::compute(int eflag, int vflag)
{
  ev_init(eflag, vflag);
  if (neighbor->ago == 0) check_special_bonds();    // bonds may be made during a run
  try {
    evaluate();
  } catch (const std::bad_alloc &) {    // not even LAMMPS's library interface catches it
    error->one(FLERR,
               "pair_style mliap/hlgauss: not enough memory for {} atoms and their neighbors on "
               "rank {}; use more ranks or nodes",
               list->inum, comm->me);
  }
}

void PairHLGauss::evaluate()
{
  const double start = platform::walltime();
  nodes.build(list, type_to_element, model->info(), exchange_features, edges_on_device);
  const double built = platform::walltime();

  const bool with_fields = fields_wanted();
  const auto num_owned = (size_t) nodes.graph.num_owned();
  const HLGauss::Request request = {comm_forward > 0, with_fields, vflag_global != 0,
                                    vflag_atom != 0, cvflag_atom != 0};
  if (comm_forward > 0 || (with_fields && model->info().num_sums > 0))
    exchange.prepare(comm, this, nodes.atoms, num_owned, atom->nlocal + atom->nghost);
  std::string problem;
  if (!model->evaluate(nodes.graph, request, exchange, result, problem))
    error->one(FLERR,
               "pair_style mliap/hlgauss: evaluating {} failed on rank {} with {} atoms and {} "
               "edges: {}",
               model_path, comm->me, num_owned, nodes.graph.centers.size(), problem);
  if (!result.notice.empty()) error->warning(FLERR, "hlgauss: {}", result.notice);
  check_finite(num_owned);
  const double evaluated = platform::walltime();
  tally();

  if (with_fields) {
    const auto size = (size_t) std::max(1, atom->nmax);
    for (size_t k = 0; k < fields().size(); k++) {
      const bool energy_like = model->info().field_units[k].rfind("eV", 0) == 0;
      const double unit = energy_like ? energy_unit : 1.0;
      field_values[k].resize(size);
      std::fill_n(field_values[k].begin(), atom->nlocal, 0.0);    // of types without an element
      for (size_t node = 0; node < num_owned; node++)
        field_values[k][nodes.atoms[node]] = unit * result.fields[k][node];
    }
    fields_step = update->ntimestep;
    fields_tags.assign(atom->tag, atom->tag + (atom->tag_enable ? atom->nlocal : 0));
    num_with_fields++;
  }

  num_evaluations++;
  num_edges_seen += (bigint) result.num_edges;
  peak_bytes = std::max(peak_bytes, result.peak_bytes);
  num_centers_seen += (bigint) num_owned;
  time_graph += built - start;
  time_model += evaluated - built;
  time_tally += platform::walltime() - evaluated;
}

/* ----------------------------------------------------------------------
   after each run: what it cost
------------------------------------------------------------------------- */

void PairHLGauss::finish()
{
  if (num_evaluations == 0) return;
  bigint count[2] = {num_edges_seen, num_centers_seen};
  double seconds[4] = {time_graph, time_model - exchange.seconds, exchange.seconds, time_tally};
  MPI_Allreduce(MPI_IN_PLACE, count, 2, MPI_LMP_BIGINT, MPI_SUM, world);
  MPI_Allreduce(MPI_IN_PLACE, seconds, 4, MPI_DOUBLE, MPI_SUM, world);
  MPI_Allreduce(MPI_IN_PLACE, &peak_bytes, 1, MPI_DOUBLE, MPI_MAX, world);
  if (comm->me != 0) return;
  const double milli = 1000.0 / (double) num_evaluations / comm->nprocs;
  utils::logmesg(
      lmp,
      "hlgauss: {} evaluations, {} of them with uncertainty; ms per evaluation, mean over ranks: "
      "graph {:.3f}, model {:.3f}, exchange {:.3f}, sums {:.3f}; {:.1f} edges per atom; at most "
      "{:.1f} MiB of tensors on a rank\n",
      num_evaluations, num_with_fields, milli * seconds[0], milli * seconds[1], milli * seconds[2],
      milli * seconds[3], (double) count[0] / (double) std::max<bigint>(1, count[1]),
      peak_bytes / 1048576.0);
}

/* ----------------------------------------------------------------------
   features of atoms between two layers of a message-passing model
------------------------------------------------------------------------- */

int PairHLGauss::pack_forward_comm(int n, int *atoms, double *buffer, int, int *)
{
  return exchange.pack(n, atoms, buffer);
}

void PairHLGauss::unpack_forward_comm(int n, int first, double *buffer)
{
  exchange.unpack(n, first, buffer);
}

int PairHLGauss::pack_reverse_comm(int n, int first, double *buffer)
{
  return exchange.pack(n, first, buffer);
}

void PairHLGauss::unpack_reverse_comm(int n, int *atoms, double *buffer)
{
  exchange.add(n, atoms, buffer);
}

/* ---------------------------------------------------------------------- */

void *PairHLGauss::extract(const char *name, int &dim)
{
  dim = 0;
  if (strcmp(name, "hlgauss_pair") == 0) return this;
  if (!model) return nullptr;
  if (strcmp(name, "cutoff") == 0) return const_cast<double *>(&model->info().cutoff);
  if (strcmp(name, "model_hash") == 0) return model_hash.data();
  if (strcmp(name, "model_path") == 0) return model_path.data();
  if (strcmp(name, "model_card") == 0) return const_cast<char *>(model->info().card.c_str());
  if (strcmp(name, "fields") == 0) return field_names.data();
  for (size_t k = 0; k < fields().size(); k++)
    if (fields()[k] + "_flag" == name) return &field_flags[k];
  return nullptr;
}

void *PairHLGauss::extract_peratom(const char *name, int &num_columns)
{
  num_columns = 0;
  if (!model || fields_step != update->ntimestep) return nullptr;
  // between runs commands such as write_restart and balance send atoms to other ranks
  const auto owned = atom->tag_enable ? atom->nlocal : 0;
  if (!std::equal(fields_tags.begin(), fields_tags.end(), atom->tag, atom->tag + owned))
    return nullptr;
  for (size_t k = 0; k < fields().size(); k++)
    if (fields()[k] == name) return field_values[k].data();
  return nullptr;
}

double PairHLGauss::memory_usage()
{
  double bytes = Pair::memory_usage();
  bytes += nodes.memory_usage() + (double) sizeof(double) * result.forces.capacity();
  bytes += peak_bytes;
  for (const auto &values : field_values) bytes += (double) sizeof(double) * values.capacity();
  return bytes;
}
