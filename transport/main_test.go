package transport

import (
	"flag"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// Slots and buffers are overwritten when they are given back. Benchmarks do without.
	poison = flag.Lookup("test.bench").Value.String() == ""
	testutil.Main(m)
}
