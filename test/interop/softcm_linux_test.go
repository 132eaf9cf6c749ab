package main

import (
	"context"
	"os/exec"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// The C programs on rxe.
func TestSoftCMWithC(t *testing.T) {
	n := testutil.NewRXENet(t)
	defer n.Sniff(t).Check()
	softCMWithC(t, n, softRuns)
	t.Run("IPv6", func(t *testing.T) { softCMWithC(t, n.OverIPv6(), softRuns[:1]) })
}

func softCMWithC(t *testing.T, n *testutil.RXENet, runs []softRun) {
	soft, rxe := n.Soft.String(), n.RXE.String()
	for _, r := range runs {
		name, err := exec.LookPath(r.Name)
		if err != nil {
			missing(t, "%v", err)
		}
		for _, goServes := range []bool{true, false} {
			t.Run(r.String()+"/"+role(goServes), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 2*testutil.Patience)
				defer cancel()
				port := freePort(t)
				var child *testutil.Child
				args := r.args(rxe, "", port)
				if goServes {
					child = r.child(t, n.Namespace, "", soft, "", port)
					args = r.args(rxe, soft, port)
				}
				c, err := start(ctx, cancel, name, args...)
				if err != nil {
					t.Fatal(err)
				}
				if !goServes {
					child = r.child(t, n.Namespace, "", soft, rxe, port)
				}
				err = child.Wait()
				if _, cErr := finished(c); cErr != nil || err != nil {
					t.Errorf("here: %v; C: %v", err, cErr)
				}
			})
		}
	}
}
