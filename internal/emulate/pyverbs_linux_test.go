package emulate

import (
	"compress/gzip"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

var update = flag.Bool("update", false, "write golden.txt.gz, and with -pyverbs pyverbs.txt, in testdata anew")

var pyverbs = flag.Bool("pyverbs", false, "run rdma-core's tests in Python")

// rdmaCoreTests is where Debian's package rdma-core has its tests.
const rdmaCoreTests = "/usr/share/doc/rdma-core/tests"

// pyverbsModules are those that can be run without other hardware. Left out are test_parent_domain, of whose allocators in Python one ends the
// interpreter with a segmentation fault; test_rdmacm and test_mlx5_rdmacm, which take rdma_cm; test_rss_traffic, which fails for want of RSS;
// test_mlx5_dm_ops and test_mlx5_huge_page, which fail for want of DEVX and, in part, of huge pages; the other ones of mlx5, all of whose tests
// are skipped (crypto, dma_memcpy, flow, lag_affinity, mkey, pp, sched, udp_sport, var) or all but one that prints nothing (dr); vfio; and those
// of CUDA and efa.
var pyverbsModules = []string{"test_addr", "test_atomic", "test_cq", "test_cq_events", "test_cqex", "test_device", "test_mr", "test_pd",
	"test_qp", "test_qpex", "test_shared_pd", "test_relaxed_ordering", "test_fork", "test_odp", "test_flow", "test_tag_matching",
	"test_mlx5_cq", "test_mlx5_uar", "test_mlx5_raw_wqe", "test_mlx5_timestamp", "test_mlx5_query_port", "test_mlx5_devx", "test_mlx5_dc"}

// rdma-core's own tests end as testdata/pyverbs.txt says, each with a reason if it does not pass. Those that draw what they do may have
// more than one result.
func TestPyverbs(t *testing.T) {
	if !*pyverbs {
		t.Skip("it takes minutes: -pyverbs runs it")
	}
	if _, err := os.Stat("/usr/lib/python3/dist-packages/pyverbs"); err != nil {
		testutil.Skip(t, "python3-pyverbs is not installed")
	}
	top := t.TempDir()
	unpackTests(t, top)
	script, err := filepath.Abs("testdata/run_pyverbs.py")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, m := range pyverbsModules {
		out := filepath.Join(top, m)
		log := run(t, Config{}, fmt.Sprintf("/usr/bin/python3 '%s' '%s' '%s' mlx5_0 %s", script, top, out, m))
		results := readResults(t, out)
		if len(results) == 0 {
			t.Errorf("%s has no tests, and prints\n%s", m, log)
		}
		maps.Copy(got, results)
	}
	const list = "testdata/pyverbs.txt"
	if *update {
		writeResults(t, list, got)
	}
	want := readResults(t, list)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		w, why, explained := strings.Cut(want[name], " # ")
		g, ok := got[name]
		switch word, _, _ := strings.Cut(g, " "); {
		case !ok:
			t.Errorf("%s was not run", name)
		case !slices.Contains(strings.Split(strings.Fields(w)[0], "/"), word):
			t.Errorf("%s: %s, expected %s", name, g, want[name])
		case word == "failed" && (!explained || why == ""):
			t.Errorf("%s: the list has no reason why it fails", name)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %s, and is not in the list", name, got[name])
		}
	}
}

// unpackTests puts the package's tests, which it compresses, into a folder.
func unpackTests(t *testing.T, top string) {
	t.Helper()
	files, _ := filepath.Glob(rdmaCoreTests + "/*.py*")
	if len(files) == 0 {
		testutil.Skip(t, "rdma-core's tests are not in "+rdmaCoreTests)
	}
	if err := os.Mkdir(filepath.Join(top, "tests"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		r, err := os.Open(f)
		if err != nil {
			t.Fatal(err)
		}
		var from io.Reader = r
		name, packed := strings.CutSuffix(filepath.Base(f), ".gz")
		if packed {
			if from, err = gzip.NewReader(r); err != nil {
				t.Fatal(err)
			}
		}
		b, err := io.ReadAll(from)
		r.Close()
		if err == nil {
			err = os.WriteFile(filepath.Join(top, "tests", name), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// readResults reads lines of a test's name and how it ended.
func readResults(t *testing.T, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if name, result, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			m[name] = result
		}
	}
	return m
}

func writeResults(t *testing.T, file string, got map[string]string) {
	old := readResults(t, file)
	var b strings.Builder
	b.WriteString("# rdma-core 44.0's tests on an emulated device: name, result, what the test says; behind a # why a failure stays.\n")
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if w, _, _ := strings.Cut(old[name], " "); strings.Contains(w, "/") {
			got[name] = old[name]
		}
		fmt.Fprintf(&b, "%s %s", name, got[name])
		if _, why, ok := strings.Cut(old[name], " # "); ok && strings.HasPrefix(got[name], "failed") {
			b.WriteString(" # " + why)
		}
		b.WriteByte('\n')
	}
	if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}
