package main

import (
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func init() { testutil.RegisterChild("main", func([]string) { main() }) }

func TestMain(m *testing.M) { testutil.Main(m) }

// What the program opens it closes: others copy it.
func TestLeavesNothing(t *testing.T) {
	testutil.CheckLeaks(t)
	main()
}

func TestQuickstart(t *testing.T) {
	c := testutil.StartChild(t, "main")
	if got := c.Expect("hello, world"); !strings.HasPrefix(got, "(device ") || strings.Contains(got, "path )") {
		t.Errorf("printed %q", got)
	}
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}
