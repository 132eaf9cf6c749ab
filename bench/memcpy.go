package main

import (
	"encoding/json"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// memcpyArgs says how often to copy Size bytes from one registered region to another: the upper bound of what a WRITE
// of that size can reach, between mappings of the same kind.
type memcpyArgs struct{ Size, Copies int }

func memcpyRole(raw json.RawMessage) error {
	var a memcpyArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return err
	}
	ctx, err := verbs.Open("soft0")
	if err != nil {
		return err
	}
	defer ctx.Close()
	pd, err := ctx.AllocPD()
	if err != nil {
		return err
	}
	defer pd.Close()
	var regions [2]*mr.MR
	for i := range regions {
		if regions[i], err = mr.Alloc(pd, a.Size, ib.AccessLocalWrite|ib.AccessRemoteWrite); err != nil {
			return err
		}
		defer regions[i].Close()
		for j := range regions[i].Bytes() {
			regions[i].Bytes()[j] = byte(j)
		}
	}
	dst, src := regions[0].Bytes(), regions[1].Bytes()
	// From 1 MiB on, Go's copy writes around the caches, which is slower while both buffers fit into them. The better of
	// the two is what a WRITE is measured against.
	run := func(n, piece int) float64 {
		begin := time.Now()
		for range n {
			for off := 0; off < a.Size; off += piece {
				end := min(off+piece, a.Size)
				copy(dst[off:end], src[off:end])
			}
		}
		return float64(a.Size) * float64(n) / time.Since(begin).Seconds() / 1e9
	}
	const piece = 64 << 10
	run(a.Copies/10, piece)
	v := values{"bw_whole": run(a.Copies/2, a.Size), "bw_pieces": run(a.Copies/2, piece)}
	v["bw"] = max(v["bw_whole"], v["bw_pieces"])
	say("result", v)
	return nil
}

type memcpyTest struct{ size, copies int }

func (m memcpyTest) run(*config) (values, error) {
	p, err := start("memcpy", memcpyArgs{m.size, m.copies})
	if err != nil {
		return nil, err
	}
	defer p.stop()
	var v values
	return v, p.expect("result", &v, time.Minute)
}
