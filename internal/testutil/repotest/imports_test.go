package repotest

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

// arrows is the import direction of docs/architecture.md: each folder, with what its non-test files may import from
// this module. An entry covers the folders below it that have none of their own. verbs/ib is open to everyone but
// internal/abi.
var arrows = map[string][]string{
	"verbs/ib":     {},
	"internal/abi": {},

	"internal/ring":    {"internal/mem", "internal/abi"},
	"internal/mem":     {"internal/abi"},
	"internal/roce":    {},
	"internal/pcap":    {},
	"internal/driver":  {},
	"internal/remedy":  {},
	"internal/procmem": {},
	"internal/seccomp": {"internal/procmem"},
	"internal/netlink": {},
	"internal/nldev":   {"internal/abi", "internal/netlink"},
	"internal/uverbs":  {"internal/abi", "internal/driver", "internal/remedy", "internal/mem", "internal/netlink", "internal/nldev", "internal/rdmacm"},
	"internal/rdmacm":  {"internal/abi", "internal/driver", "internal/netlink", "internal/mem"},
	"internal/softnic": {"internal/softnic", "internal/softnic/observe", "internal/driver", "internal/ring", "internal/roce", "internal/mem", "internal/netlink", "internal/abi"},
	// What a NIC and those who observe it from other processes have in common.
	"internal/softnic/observe": {"internal/softnic", "internal/roce", "internal/pcap", "internal/mem"},
	"internal/provider":        {"internal/provider/soft", "internal/provider/rxe", "internal/provider/siw", "internal/provider/mlx5", "internal/driver"},
	"internal/provider/soft":   {"internal/softnic", "internal/driver", "internal/ring", "internal/mem"},
	"internal/provider/rxe":    {"internal/uverbs", "internal/driver", "internal/ring", "internal/mem", "internal/abi"},
	"internal/provider/siw":    {"internal/uverbs", "internal/driver", "internal/ring", "internal/mem", "internal/abi"},
	"internal/provider/mlx5":   {"internal/uverbs", "internal/driver", "internal/ring", "internal/mem", "internal/abi"},
	// An emulated device below uverbs: what drives it is a provider, or a C program.
	"internal/mlx5emu": {"internal/softnic", "internal/driver", "internal/mem", "internal/abi"},
	"internal/cmemu":   {"internal/mlx5emu", "internal/softnic", "internal/driver", "internal/roce", "internal/abi"},
	"internal/emulate": {"internal/cmemu", "internal/mlx5emu", "internal/seccomp", "internal/procmem", "internal/softnic", "internal/driver", "internal/abi"},
	"internal/life":    {"internal/driver"}, // Close, once for all public objects

	"verbs":                   {"internal/provider", "internal/driver", "internal/life", "internal/remedy"},
	"mr":                      {"verbs", "internal/driver", "internal/life", "internal/mem"},
	"qp":                      {"verbs", "internal/driver", "internal/life"}, // mr is a sibling: ib.SGE is what they share
	"internal/cmaddr":         {"verbs", "internal/remedy"},
	"transport":               {"transport", "qp", "mr", "verbs", "internal/cmaddr", "internal/remedy", "internal/ring"},
	"transport/transporttest": {"transport", "verbs"},
	"rpc":                     {"rpc", "transport", "mr", "internal/ring"}, // never a QP

	"internal/perf":        {"internal/perf", "internal/cmaddr", "rpc", "transport", "qp", "mr", "verbs"},
	"cmd":                  {"cmd", "internal/conformance", "internal/emulate", "internal/seccomp", "internal/softnic/observe", "internal/pcap", "internal/perf", "internal/remedy", "internal/roce", "rpc", "transport", "qp", "mr", "verbs"},
	"examples":             {"examples", "rpc", "transport", "qp", "mr", "verbs"},
	"internal/testutil":    {"internal/testutil"},
	"internal/conformance": {"internal/testutil", "internal/softnic", "internal/softnic/simnet", "internal/driver", "qp", "mr", "verbs"},
	"internal/cmd":         {},
	"bench":                {"bench", "internal/emulate", "internal/seccomp", "internal/perf", "internal/roce", "rpc", "transport", "qp", "mr", "verbs"},
	"test":                 {"test", "internal/emulate", "internal/seccomp", "internal/testutil", "internal/netlink", "internal/nldev", "rpc", "transport", "qp", "mr", "verbs"},
}

// entryOf returns the folder whose entry of arrows covers folder.
func entryOf(folder string) (string, bool) {
	for f := folder; ; {
		if _, ok := arrows[f]; ok {
			return f, true
		}
		i := strings.LastIndexByte(f, '/')
		if i < 0 {
			return "", false
		}
		f = f[:i]
	}
}

// mayImport reports whether the arrows let non-test files of one folder import another.
func mayImport(from, to string) bool {
	entry, ok := entryOf(from)
	if !ok || from == "internal/abi" && to == "verbs/ib" {
		return false
	}
	target, ok := entryOf(to)
	return ok && (target == "verbs/ib" || slices.Contains(arrows[entry], target) || target == entry && from != to && under(from, entry))
}

func TestImportArrows(t *testing.T) {
	each(t, func(s *source) {
		if _, ok := entryOf(s.folder); !ok && !under(s.folder, "tools") {
			t.Errorf("%s: the folder %s has no place in the import direction: give it one in internal/testutil/repotest and docs/architecture.md",
				s.name, s.folder)
			return
		}
		for _, imp := range s.syntax.Imports {
			p, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if p == "C" {
				t.Errorf("%s: import \"C\": this project does without cgo", line(imp.Pos()))
			}
			to, ours := strings.CutPrefix(p, module+"/")
			if !ours || s.isTest() {
				continue
			}
			if !mayImport(s.folder, to) {
				t.Errorf("%s: %s must not import %s", line(imp.Pos()), s.folder, to)
			}
		}
	})
}

// A table that lets everything through would go unnoticed.
func TestImportArrowsRefuse(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"rpc", "transport", true},
		{"rpc", "qp", false},
		{"qp", "mr", false},
		{"verbs", "qp", false},
		{"verbs/ib", "verbs", false},
		{"internal/provider/soft", "verbs", false},
		{"internal/provider/soft", "verbs/ib", true},
		{"internal/softnic/shm", "internal/ring", true},
		{"internal/softnic", "internal/provider", false},
		{"transport", "internal/testutil", false},
		{"transport", "internal/driver", false},
		{"examples/kv", "internal/mem", false},
		{"internal/provider", "internal/provider/soft", true},
		{"internal/provider/soft", "internal/provider", false},
		{"internal/nowhere", "verbs/ib", false},
	} {
		if got := mayImport(c.from, c.to); got != c.want {
			t.Errorf("mayImport(%s, %s) = %v, want %v", c.from, c.to, got, c.want)
		}
	}
}
